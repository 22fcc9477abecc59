"""FSDP2 through Lightning's ModelParallelStrategy: weights, gradients, optimizer state and average
are shared out over all processes. What is saved is whole, checked, and loads on one process."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flextok.files import sync
from flextok.nn.blocks import transformer_blocks
from flextok.training.checkpoints import crc32, remove


class ShardedStrategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`. Checkpoints are folders with a file for each process, written
    aside and renamed."""

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        aside = path.with_name(f".{path.name}.tmp")
        if self.is_global_zero:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.barrier()
        super().save_checkpoint(checkpoint, aside, storage_options)
        own = sorted(aside.glob(f"__{self.global_rank}_*.distcp"))
        if self.is_global_zero:
            own += [aside / ".metadata", aside / "meta.pt"]
        record = {"world_size": self.world_size, "files": {file.name: crc32(file) for file in own}}
        sums = aside / f"checksums-{self.global_rank}.json"
        sums.write_text(json.dumps(record), encoding="utf-8")
        for file in (*own, sums):
            sync(file)
        self.barrier()
        if self.is_global_zero:
            if path.exists():
                remove(path)
            os.replace(aside, path)
            sync(path.parent)
        self.barrier()


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """torch.compile each transformer block: one graph serves all that are alike, and hooks that
    gather or recompute stay outside of it."""
    for block in transformer_blocks(model):
        block.forward = torch.compile(block.forward, **options)


def shard(objective: nn.Module, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Share an objective's weights out over `mesh`, each block on its own. Its forward gathers
    them. bf16: gather the blocks' weights in bf16, half the traffic, for a forward under autocast,
    which leaves all else in fp32 as without sharding; gradients are summed in fp32."""
    for module in (*transformer_blocks(objective), objective):
        half = torch.bfloat16 if bf16 and module is not objective else None
        policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Gathers the weights of a sharded module, and keeps them until the end: inside, any method of
    any part works as on one process, under autocast where they are gathered in bf16. Every process
    must enter; a module that is not sharded is left as it is."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    gathered = [p for part in parts for p in part.parameters()]
    half = any(p.dtype is torch.bfloat16 for p in gathered)
    device = gathered[0].device.type if gathered else "cpu"
    try:
        with torch.autocast(device, torch.bfloat16) if half else nullcontext():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """A state dict with whole tensors in place of sharded ones, one after the other, on the CPU.
    Every process must call this; {} where it does not `keep` the result."""
    full = {}
    for name, value in state.items():
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            full[name] = tensor.detach().cpu()
    return full
