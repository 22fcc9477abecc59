"""What the published sizes do on a GPU: tests, training steps, encoding, decoding, generating.

    python benchmarks/gpu.py [--sizes flextok_d12_d12 ar_class_49M] [--json gpu.json]

First the ceilings (a large matrix product, a large copy within the GPU), then the tests that need
CUDA, then a training step of each config in bf16 with torch.compile at the largest batch that fits,
beside `flextok plan`'s memory, then the rows of `flextok bench`. Random weights and inputs. Without
a GPU, or with --dry, each config's training step runs on fake CUDA tensors in place of all that: it
shows that no operation mixes devices, and counts those that would wait for the GPU.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fake_gpu import DEVICE, FakeGPU, autocast

from flextok.bench import (
    bench,
    format_machine,
    format_result,
    measure,
    measure_machine,
    peak_memory,
    reset_peak_memory,
)
from flextok.cli.options import write_json
from flextok.config import ExperimentConfig, load_experiment
from flextok.generators import Generator
from flextok.generators.conditioning import TextConditioner
from flextok.generators.text import Text
from flextok.objectives.base import Objective
from flextok.training import plan
from flextok.training.optim import make_optimizer
from flextok.training.sharding import compile_blocks

ROOT = Path(__file__).parent.parent
SMALL = ("quickstart", "emoji", "compare")  # configs of these names are no published sizes
ROWS = ["d12-d12", "d18-d18", "d18-d28", "ar-49M", "ar-1.33B", "titok-b64", "maskgit-l32"]
MANY = 64  # forward passes that a row's batch is good for


def published() -> list[str]:
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    return [name for name in names if not name.startswith(SMALL)]


def read(name: str) -> ExperimentConfig:
    return load_experiment(ROOT / "configs" / f"{name}.yaml")


def dry(name: str, batch: int = 2) -> list[str]:
    """A config's loss on fake CUDA tensors, in bf16. Returns where it would wait for the GPU."""
    config = read(name)
    if config.trainer.checkpoint_blocks:  # for a backward pass, which there is none
        config = replace(config, trainer=replace(config.trainer, checkpoint_blocks=False))
    with FakeGPU() as gpu:
        module = plan.build(config, DEVICE)
        inputs = make_batch(module.model, batch)
        with autocast(torch.bfloat16):
            module(inputs)  # constants reach the GPU
            del gpu.waits[:]
            module(inputs)
    return gpu.waits


def training_step(name: str, device: torch.device, matmul_flops: float) -> dict[str, Any]:
    """Time and memory of a step at the config's batch size, or the largest half of it that fits."""
    config, found = read(name), None
    batch = config.data.batch_size
    while batch and found is None:
        torch.cuda.empty_cache()
        reset_peak_memory(device)
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            found = timed_step(config, batch, device)
        batch = batch if found else batch // 2
    if found is None:
        return {"config": name, "fits": False}
    sized = replace(config, data=replace(config.data, batch_size=batch))
    step = plan.measure(sized)
    planned = plan.plan(replace(sized, trainer=replace(sized.trainer, devices=1, num_nodes=1)), 1)
    return {
        **{"config": name, "fits": True, "batch_size": batch, "seconds": found},
        "images_per_second": batch / found,
        "peak_share": step.flops * batch / found / matmul_flops,
        "memory": peak_memory(device),
        "planned_memory": sum(planned.memory.values()),
    }


def timed_step(config: ExperimentConfig, batch: int, device: torch.device) -> float:
    module = plan.build(config, device)
    compile_blocks(module.model)
    step = make_step(module, config, batch)
    for _ in range(3):  # compiles
        step()
    return measure(step, device, 5)[0]


def make_step(
    module: Objective, config: ExperimentConfig, batch: int
) -> Callable[[], torch.Tensor]:
    """A training step in bf16, which returns its loss."""
    optimizer = make_optimizer(module, config.optim)
    inputs = real_batch(module.model, batch)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(module.model.device.type, torch.bfloat16):
            loss = module(inputs)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def make_batch(model: Any, count: int) -> dict[str, Any]:
    """What training would be given, on the model's device; texts of the greatest length."""
    with model.device:
        if not isinstance(model, Generator):
            dtype = next(model.parameters()).dtype
            return {"image": torch.empty(count, 3, *2 * [model.image_size], dtype=dtype)}
        batch: dict[str, Any] = {"indices": torch.empty(count, model.num_tokens, dtype=torch.long)}
        batch["label"] = torch.empty(count, dtype=torch.long)
        if isinstance(model.conditioner, TextConditioner):
            encoder = model.conditioner.encoder
            shape = (count, encoder.max_length)
            values = torch.empty(*shape, encoder.dim)
            if not encoder.frozen:
                values = torch.empty(shape, dtype=torch.long)
            batch["text"] = Text(values, torch.empty(shape, dtype=torch.bool))
        return batch


def real_batch(model: Any, batch: int) -> dict[str, Any]:
    """A batch with values in it: zeros are valid images, indices, labels and texts."""
    inputs = make_batch(model, batch)
    for value in inputs.values():
        for tensor in (value,) if isinstance(value, torch.Tensor) else (value.values, value.mask):
            tensor.zero_()
    if "text" in inputs:
        inputs["text"].mask.fill_(True)
    return inputs


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes read and written a second by a copy within the GPU."""
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / measure(lambda: target.copy_(source), device, 10)[0]


def run(names: list[str], device: torch.device) -> dict[str, Any]:
    machine = measure_machine(device, torch.bfloat16)
    report: dict[str, Any] = {"machine": asdict(machine), "copy_bandwidth": copy_bandwidth(device)}
    print(format_machine(report["machine"]))
    print(f"copy within the GPU: {report['copy_bandwidth'] / 1e9:,.0f} GB/s read and written")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    report["tests_passed"] = subprocess.run(command, cwd=ROOT).returncode == 0
    report["training"] = []
    for name in names:
        found = training_step(name, device, machine.matmul_flops)
        report["training"].append(found)
        if found["fits"]:
            print(
                f"{name:24s} batch {found['batch_size']}, {found['images_per_second']:,.1f} "
                f"images/s, {found['peak_share']:.0%} of peak, {found['memory'] / 1e9:.1f} GB, "
                f"planned {found['planned_memory'] / 1e9:.1f} GB",
                flush=True,
            )
        else:
            print(f"{name:24s} does not fit with one sample", flush=True)
    rows = bench(
        ROWS,
        device=str(device),
        dtype="bfloat16",
        batches=[1, MANY],
        report=lambda result: print(format_result(result), flush=True),
    )
    return {**report, "rows": rows["results"]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=published(), default=published())
    parser.add_argument("--json", default=str(ROOT / "benchmarks" / "results" / "gpu.json"))
    parser.add_argument("--dry", action="store_true", help="fake CUDA tensors, even beside a GPU")
    options = parser.parse_args(arguments)
    if torch.cuda.is_available() and not options.dry:
        write_json(options.json, run(options.sizes, torch.device("cuda", 0)))
        return 0
    print("no GPU is used: training steps on fake CUDA tensors, nothing is measured")
    waits = {name: dry(name) for name in options.sizes}
    for name, lines in waits.items():
        print(f"{name:24s} {len(lines)} waits", *lines, sep="\n    ")
    return 1 if any(waits.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
