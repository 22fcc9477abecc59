"""FSDP2 through Lightning's ModelParallelStrategy: weights, gradients, optimizer state and average
are shared out over all processes; what is saved is whole, checked, and loads on one process."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from flextok.files import sync
from flextok.training.checkpoints import crc32, remove

# what training, validation and pictures call of a model: FSDP2 gathers its weights for these
ENTRIES = ("loss", "encode", "encode_codes", "decode", "decode_codes", "reconstruct", "generate")


class ShardedStrategy(ModelParallelStrategy):
    """`trainer.strategy: fsdp2`. Checkpoints are folders with a file a process, written aside and
    renamed."""

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


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of a model: what its module lists named "blocks" hold."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "blocks" and isinstance(module, nn.ModuleList):
            yield from module


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """torch.compile each transformer block: one graph for all alike, soon compiled, and hooks that
    gather or recompute stay outside of it."""
    for block in blocks(model):
        block.forward = torch.compile(block.forward, **options)


def shard(model: nn.Module, mesh: DeviceMesh, bf16: bool = False) -> None:
    """Share a model's weights out over `mesh`, each block on its own. bf16: gather the weights in
    bf16, half the traffic; gradients are summed in fp32 either way."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    gather_once(model, [name for name in ENTRIES if hasattr(model, name)])


def gather_once(model: Any, names: Iterable[str]) -> None:
    """Have those methods gather the weights that lie outside of blocks. Of one that calls another
    the outer does it: the inner one's end would share them out again too early."""
    busy = False

    def entry(plain: Callable[..., Any], gathering: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal busy
            if busy:
                return plain(*arguments, **options)
            busy = True
            try:
                return gathering(*arguments, **options)
            finally:
                busy = False

        return call

    for name in names:
        plain = getattr(model, name)
        register_fsdp_forward_method(model, name)
        setattr(model, name, entry(plain, getattr(model, name)))


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(state: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """A state dict with whole tensors in place of sharded ones, one after the other, on the CPU.
    Every process must call this; {} where it does not `keep` the result."""
    whole = {}
    for name, value in state.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = full.detach().cpu()
    if dist.is_initialized():
        dist.barrier()  # a process that ended here could cut the others' last transfer
    return whole


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint folder, whole, in one process."""
    listed = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    prefix = "state_dict."
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in listed.items()
        if key.startswith(prefix) and isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}
