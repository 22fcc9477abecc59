"""`flextok bench`: what encoding, decoding, generating and a training step cost, beside what the
machine can do. Random weights, random inputs.

Rates on a CPU are per CPU second and thread, so that a machine shared with others measures right;
on a GPU per second. FLOPs are those of matrix products, attention and convolutions that were run,
2 a multiply-add. FlexTok's rows are about latents: its VAE is not part of them.
"""

import functools
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from flextok.config import OptimConfig, load_experiment
from flextok.cpu import ONEDNN_LINEAR, accelerate, cpuinfo, linear
from flextok.generators.base import Generator
from flextok.objectives import make_objective
from flextok.registry import MODELS, build_model
from flextok.schema import unknown_key
from flextok.tokenizers import FlexTok
from flextok.training.optim import make_optimizer

_SMALL_VAE = {"name": "kl", "block_channels": [32, 32, 32, 32]}  # 16 channels, f8; never run here
_QUICKSTART = {"image_size": 64, "patch_size": 8, "num_registers": 16, "head_dim": 32}
_LEVELS = {"quantizer": {"name": "fsq", "levels": [8, 8, 8]}, "vae": {"name": "identity"}}


def _flextok(encoder: int, decoder: int) -> dict[str, Any]:
    depths = {"encoder_depth": encoder, "decoder_depth": decoder}
    return {"name": "flextok", **depths, "vae": _SMALL_VAE}


def _titok(num_tokens: int, dim: int, depth: int) -> dict[str, Any]:
    sizes = {"dim": dim, "depth": depth}
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in sizes.items()}
    return {"name": "titok", "stage": "finetune", "num_tokens": num_tokens, **sides}


def _maskgit(num_tokens: int, temperature: float, guidance_scale: float) -> dict[str, Any]:
    sampling = {"num_steps": 8, "temperature": temperature, "guidance_scale": guidance_scale}
    return {
        **{"name": "maskgit", "dim": 768, "depth": 24, "num_heads": 16},
        **{"vocab_size": 4096, "num_tokens": num_tokens},
        "conditioner": {"name": "class", "num_classes": 1000, "learned_null": True},
        "generate": {**sampling, "guidance_decay": "linear"},
    }


# name -> the model, and the batch sizes measured
SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "quickstart": (
        {
            **{"name": "flextok", **_QUICKSTART, **_LEVELS},
            **{"encoder_depth": 2, "encoder_dim": 128, "decoder_depth": 4, "decoder_dim": 128},
        },
        (1, 16),
    ),
    "quickstart-ar": (
        {
            **{"name": "gpt", "depth": 4, "dim": 128, "num_heads": 4},
            **{"vocab_size": 512, "num_tokens": 16},
        },
        (1, 64),
    ),
    "d12-d12": (_flextok(12, 12), (1, 4)),
    "d18-d18": (_flextok(18, 18), (1,)),
    "d18-d28": (_flextok(18, 28), (1,)),
    "ar-49M": ({"name": "gpt", "depth": 10}, (1,)),
    "ar-1.33B": ({"name": "gpt", "depth": 30}, (1,)),
    "titok-s128": (_titok(128, 512, 8), (1,)),
    "titok-b64": (_titok(64, 768, 12), (1, 8)),
    "titok-l32": (_titok(32, 1024, 24), (1, 8)),
    "maskgit-l32": (_maskgit(32, 9.5, 4.5), (4,)),
    "maskgit-b64": (_maskgit(64, 11.0, 3.0), (4,)),
}
DEFAULT_SIZES = ("quickstart", "quickstart-ar", "d12-d12", "ar-49M", "titok-s128", "maskgit-l32")


@dataclass
class Machine:
    device: str
    processor: str
    torch: str
    threads: int
    dtype: str
    matmul_flops: float  # a second
    bandwidth: float  # bytes read a second


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# from shapes, for operations that torch's counter lacks in some versions
FLOPS: dict[Any, Any] = {
    ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATTENTION_BACKWARD: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}
if ONEDNN_LINEAR is not None:
    FLOPS[ONEDNN_LINEAR] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]


@dataclass
class Result:
    row: str
    wall: float  # seconds a call, the best
    cpu: float
    flops: float  # of a call
    flops_per_second: float
    matmul_share: float  # of the machine's matmul_flops
    items_per_second: float  # pictures, or indices where generating
    bandwidth_share: float | None  # generating: weights and cache read, of the machine's bandwidth
    peak_memory: int  # bytes, of the process or the GPU, weights included
    mkl_cpu: float | None = None  # without oneDNN, as torch multiplies; where that was asked for


@dataclass
class Row:
    name: str
    run: Callable[[], object]
    items: int
    bytes_read: float | None = None


class Run(NamedTuple):
    """How the rows of a model are measured."""

    batch: int
    device: torch.device
    dtype: torch.dtype
    steps: int  # of FlexTok's decoder

    def integers(self, high: int, length: int) -> Tensor:
        return torch.randint(0, high, (self.batch, length), device=self.device)

    def images(self, model: Any) -> Tensor:
        shape = (self.batch, 3, model.image_size, model.image_size)
        return torch.zeros(shape, device=self.device, dtype=self.dtype)


def bench(
    sizes: list[str],
    only: str = "",
    device: str = "cpu",
    dtype: str = "float32",
    repeats: int = 3,
    batches: list[int] | None = None,
    steps: int = 4,
    compare_mkl: bool = False,
    report: Callable[[Result], None] = lambda result: None,
) -> dict[str, Any]:
    """sizes: names in SIZES or YAML files of experiments; only: rows whose name holds this text;
    steps: of FlexTok's decoder; compare_mkl: each row without oneDNN, too. Returns the machine and
    its results as plain data; `report` gets each result as it comes."""
    run = Run(1, torch.device(device), getattr(torch, dtype), steps)
    machine = measure_machine(run.device, run.dtype)
    results = []
    for size in sizes:
        for row in rows(size, run, batches, only):
            results.append(measure_row(row, machine, repeats, compare_mkl))
            report(results[-1])
    return {"machine": asdict(machine), "results": [asdict(result) for result in results]}


def rows(size: str, run: Run, batches: list[int] | None, only: str) -> Iterator[Row]:
    spec, usual = find_size(size)
    torch.manual_seed(0)
    with run.device:
        model = accelerate(build_model(MODELS, spec))
    make = flextok_rows if isinstance(model, FlexTok) else image_rows
    make = generator_rows if isinstance(model, Generator) else make
    for batch in batches or usual:
        for row in make(model, run._replace(batch=batch)):
            row.name = f"{size} {row.name}"
            if only in row.name:
                trains = "train" in row.name
                # training keeps fp32 weights and computes in dtype
                model.train(trains).to(torch.float32 if trains else run.dtype)
                yield row


def find_size(size: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The model and the usual batch sizes of a name in SIZES, or of an experiment's YAML file."""
    if size.endswith((".yaml", ".yml")):
        return {**load_experiment(size).model}, (1,)
    if size not in SIZES:
        raise unknown_key("size", size, list(SIZES))
    return SIZES[size]


def flextok_rows(model: Any, run: Run) -> Iterator[Row]:
    latents = torch.randn(run.batch, *model.noise_shape, device=run.device)
    indices, images = run.integers(model.vocab_size, model.num_tokens), run.images(model)
    # the rows are about the latents
    model.vae.has_weights = True
    model.vae.encode, model.vae.decode = (lambda *_, **__: latents.to(run.dtype)), (lambda x: x)

    def decode(scale: float, keep: int | None = None) -> Callable[[], object]:
        options = {"num_steps": run.steps, "guidance_scale": scale, "guidance": "apg"}
        return lambda: model.decode(indices, keep=keep, noise=latents, **options)

    name = f"decode B{run.batch}, {run.steps} steps"
    yield Row(f"encode B{run.batch}", lambda: model.encode(images), run.batch)
    yield Row(name, decode(1.0), run.batch)
    yield Row(f"{name}, 1 token", decode(1.0, 1), run.batch)
    yield Row(f"{name}, APG", decode(7.5), run.batch)
    yield train_row(model, {"image": images}, run)


def generator_rows(model: Any, run: Run) -> Iterator[Row]:
    labels = torch.zeros(run.batch, dtype=torch.long, device=run.device)
    items, name = run.batch * model.num_tokens, f"generate B{run.batch}"
    if model.streams:
        for scale, guided in ((1.0, ""), (1.5, ", guidance 1.5")):
            generate = functools.partial(model.generate, labels, guidance_scale=scale)
            numbers = generation_numbers(model, run.batch * (2 if guided else 1))
            name = f"generate B{run.batch}, {model.num_tokens} tokens{guided}"
            yield Row(name, generate, items, numbers * run.dtype.itemsize)
    else:
        yield Row(name, lambda: model.generate(labels), items)
    indices = run.integers(model.vocab_size, model.num_tokens)
    yield train_row(model, {"indices": indices, "label": labels}, run)


def generation_numbers(model: Any, batch: int) -> float:
    """Numbers that generating all indices must read: every weight for every index (but the
    embedding's), and the keys and values before it."""
    weights = sum(p.numel() for part in (model.blocks, model.head) for p in part.parameters())
    cached = len(model.blocks) * 2 * model.positions.shape[1] * batch * (model.num_tokens + 1) / 2
    return model.num_tokens * (weights + cached)


def image_rows(model: Any, run: Run) -> Iterator[Row]:
    """Any other tokenizer; its training wants pretrained networks, so is not measured."""
    images, indices = run.images(model), run.integers(model.vocab_size, model.num_tokens)
    yield Row(f"encode B{run.batch}", lambda: model.encode(images), run.batch)
    yield Row(f"decode B{run.batch}", lambda: model.decode(indices), run.batch)


def train_row(model: Any, batch: dict[str, Tensor], run: Run) -> Row:
    """Loss, gradients and AdamW, in fp32 or mixed precision."""
    objective, optimizer = make_objective(model), None
    draws = torch.Generator().manual_seed(0)

    def step() -> None:
        nonlocal optimizer
        optimizer = optimizer or make_optimizer(objective, OptimConfig())  # after the last move
        optimizer.zero_grad()
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            loss = objective(batch, draws)["loss"]
        loss.backward()
        optimizer.step()

    return Row(f"train step B{run.batch}", step, run.batch)


def measure_row(row: Row, machine: Machine, repeats: int, compare_mkl: bool = False) -> Result:
    device = torch.device(machine.device)
    reset_peak_memory(device)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:  # warms up, too
        row.run()
    wall, cpu = measure(row.run, device, repeats)
    seconds, flops = busy_seconds(wall, cpu, device), float(counter.get_total_flops())
    share = None if row.bytes_read is None else row.bytes_read / seconds / machine.bandwidth
    rate, mkl_cpu = flops / seconds, None
    if compare_mkl:
        with torch.backends.mkldnn.flags(enabled=False):
            _, mkl_cpu = measure(row.run, device, repeats)
    return Result(
        row=row.name,
        wall=wall,
        cpu=cpu,
        flops=flops,
        flops_per_second=rate,
        matmul_share=rate / machine.matmul_flops,
        items_per_second=row.items / seconds,
        bandwidth_share=share,
        peak_memory=peak_memory(device),
        mkl_cpu=mkl_cpu,
    )


def measure(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of a call, the best of `repeats` each."""
    best_wall = best_cpu = float("inf")
    for _ in range(repeats):
        synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        synchronize(device)
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, time.process_time() - cpu)
    return best_wall, best_cpu


def busy_seconds(wall: float, cpu: float, device: torch.device) -> float:
    """The seconds that rates refer to: wall time on a GPU, a thread's CPU time on a CPU."""
    return cpu / torch.get_num_threads() if device.type == "cpu" else wall


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine's best rates: of square and of transformer-shaped matrix products, by the better
    of the libraries that `linear` takes, and of reading memory (a dot product and a matrix-vector
    product far larger than its caches)."""
    on_gpu = device.type == "cuda"

    def seconds(run: Callable[[], object]) -> float:
        run()
        return busy_seconds(*measure(run, device, 10 if on_gpu else 5), device)

    best = 0.0
    for m, k, n in [(8192, 8192, 8192)] if on_gpu else [(2048,) * 3, (512, 768, 2048)]:
        a, b = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        repeat = 1 if on_gpu else max(1, 2048**3 // (m * k * n))
        for multiply in (F.linear, linear):
            run = functools.partial(multiply, a, b)
            took = seconds(lambda run=run, repeat=repeat: [run() for _ in range(repeat)])  # type: ignore[misc]
            best = max(best, 2.0 * m * k * n * repeat / took)
    size = 2**28 if on_gpu else 2**26
    x = torch.ones(size, device=device).to(dtype)
    matrix, vector = x.view(1024, -1), x[:1024]
    took = min(seconds(lambda: torch.dot(x[: size // 2], x[size // 2 :])),
               seconds(lambda: vector @ matrix))  # fmt: skip
    processor = cpuinfo("model name") or platform.processor() or platform.machine()
    return Machine(
        str(device),
        torch.cuda.get_device_name(device) if on_gpu else processor,
        torch.__version__,
        torch.get_num_threads(),
        str(dtype).removeprefix("torch."),
        best,
        x.nbytes / took,
    )


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the whole process so far


HEADER = (
    f"{'row':45s} {'wall s':>8s} {'CPU s':>8s} {'GFLOP':>8s} {'GFLOP/s':>8s} {'of peak':>7s} "
    f"{'of mem.':>7s} {'items/s':>8s} {'GB':>5s}"
)


def format_machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['device']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, {machine['dtype']}: "
        f"{machine['matmul_flops'] / 1e9:.0f} GFLOP/s in matrix products, "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s read"
    )


def format_result(r: Result) -> str:
    memory = "" if r.bandwidth_share is None else f"{r.bandwidth_share:.0%}"
    mkl = ""
    if r.mkl_cpu is not None:
        mkl = f"  without oneDNN {r.mkl_cpu:.3f} CPU s, {r.mkl_cpu / r.cpu:.2f}x"
    return (
        f"{r.row:45s} {r.wall:8.3f} {r.cpu:8.3f} {r.flops / 1e9:8.2f} "
        f"{r.flops_per_second / 1e9:8.1f} {r.matmul_share:7.0%} {memory:>7s} "
        f"{r.items_per_second:8.2f} {r.peak_memory / 1e9:5.1f}{mkl}"
    )
