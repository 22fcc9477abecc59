"""`flextok bench`: what encoding, decoding, generating and a training step cost, beside what the
machine can do. Random weights, random inputs.

Rates on a CPU are per CPU second and thread, so that a machine shared with others measures right;
on a GPU per second. FLOPs are those of matrix products, attention and convolutions that were run,
2 a multiply-add. FlexTok's rows are about latents: its VAE is not part of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flextok.config import OptimConfig, load_experiment
from flextok.cpu import accelerate
from flextok.generators import GENERATORS
from flextok.machine import (
    FLOPS,
    Machine,
    busy_seconds,
    measure,
    measure_machine,
    peak_memory,
    reset_peak_memory,
)
from flextok.objectives import make_objective
from flextok.registry import build_model
from flextok.schema import unknown_key
from flextok.tokenizers import TOKENIZERS
from flextok.training.optim import make_optimizer

_SMALL_VAE = {"name": "kl", "block_channels": [32, 32, 32, 32]}  # 16 channels, f8; never run here
_QUICKSTART = {"image_size": 32, "patch_size": 8, "num_registers": 16, "head_dim": 32}
_LEVELS = {"quantizer": {"name": "fsq", "levels": [8, 8, 8]}, "vae": {"name": "identity"}}


def _flextok(encoder: int, decoder: int) -> dict[str, Any]:
    depths = {"encoder_depth": encoder, "decoder_depth": decoder}
    return {"name": "flextok", **depths, "vae": _SMALL_VAE}


def _titok(num_tokens: int, dim: int, depth: int) -> dict[str, Any]:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in _dims(dim, depth)}
    return {"name": "titok", "stage": "finetune", "num_tokens": num_tokens, **sides}


def _dims(dim: int, depth: int) -> list[tuple[str, int]]:
    return [("dim", dim), ("depth", depth)]


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

# CPU seconds with one thread of the published modules. A ratio to them is one of machines, too.
PUBLISHED_ON = "a two-core AMD EPYC (Zen 3, 2.25 GHz)"
PUBLISHED = {
    "d12-d12 encode B1": 1.28,
    "d12-d12 encode B4": 7.89,
    "d12-d12 decode B1, 4 steps": 6.1,
    "d12-d12 decode B4, 4 steps": 32.8,
    "d12-d12 decode B1, 4 steps, 1 token": 6.07,
    "d12-d12 decode B1, 4 steps, APG": 13.0,
    "d18-d28 encode B1": 3.90,
    "ar-49M generate B1, 256 tokens": 108.8,
    "ar-49M generate B1, 256 tokens, guidance 1.5": 212.9,
    "titok-s128 encode B1": 0.298,
    "titok-b64 encode B1": 0.986,
    "titok-l32 encode B1": 2.90,
    "titok-b64 encode B8": 7.08,
    "titok-l32 encode B8": 21.0,
    "titok-s128 decode B1": 3.48,
    "titok-b64 decode B1": 4.70,
    "titok-l32 decode B1": 6.36,
    "maskgit-l32 generate B4": 14.6,
    "maskgit-b64 generate B4": 22.6,
}


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
    published_cpu: float | None
    mkl_cpu: float | None = None  # without oneDNN, as torch multiplies; where that was asked for


@dataclass
class Row:
    name: str
    run: Callable[[], object]
    items: int
    bytes_read: float | None = None


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
    place, kind = torch.device(device), getattr(torch, dtype)
    machine = measure_machine(place, kind)
    results = []
    for size in sizes:
        for row in rows(size, place, kind, batches, steps, only):
            results.append(measure_row(row, machine, repeats, compare_mkl))
            report(results[-1])
    return {"machine": asdict(machine), "results": [asdict(result) for result in results]}


def rows(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    batches: list[int] | None,
    steps: int,
    only: str,
) -> Iterator[Row]:
    spec, usual = find_size(size)
    kinds = TOKENIZERS if spec["name"] in TOKENIZERS else GENERATORS
    torch.manual_seed(0)
    with device:
        model = accelerate(build_model(kinds, spec))
    make = {"flextok": flextok_rows, "gpt": gpt_rows, "maskgit": maskgit_rows}
    for batch in batches or usual:
        for row in make.get(spec["name"], picture_rows)(model, batch, device, dtype, steps):
            row.name = f"{size} {row.name}"
            if only in row.name:
                trains = "train" in row.name
                # training keeps fp32 weights and computes in dtype
                model.train(trains).to(torch.float32 if trains else dtype)
                yield row


def find_size(size: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The model and the usual batch sizes of a name in SIZES, or of an experiment's YAML file."""
    if size.endswith((".yaml", ".yml")):
        return {**load_experiment(size).model}, (1,)
    if size not in SIZES:
        raise unknown_key("size", size, list(SIZES))
    return SIZES[size]


def flextok_rows(
    model: Any, batch: int, device: torch.device, dtype: torch.dtype, steps: int
) -> Iterator[Row]:
    latents = torch.randn(batch, *model.noise_shape, device=device)
    indices = torch.randint(0, model.vocab_size, (batch, model.num_tokens), device=device)
    images = torch.zeros(batch, 3, model.image_size, model.image_size, device=device)
    # the rows are about the latents
    model.vae.has_weights = True
    model.vae.encode, model.vae.decode = (lambda *_, **__: latents.to(dtype)), (lambda x: x)

    def decode(scale: float, keep: int | None = None) -> Callable[[], object]:
        options = {"num_steps": steps, "guidance_scale": scale, "guidance": "apg"}
        return lambda: model.decode(indices, keep, noise=latents, **options)

    name = f"decode B{batch}, {steps} steps"
    yield Row(f"encode B{batch}", lambda: model.encode(images), batch)
    yield Row(name, decode(1.0), batch)
    yield Row(f"{name}, 1 token", decode(1.0, 1), batch)
    yield Row(f"{name}, APG", decode(7.5), batch)
    yield Row(f"train step B{batch}", train_step(model, {"image": images}, device, dtype), batch)


def gpt_rows(
    model: Any, batch: int, device: torch.device, dtype: torch.dtype, steps: int
) -> Iterator[Row]:
    tokens, labels = model.num_tokens, torch.zeros(batch, dtype=torch.long, device=device)
    indices = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)

    def generate(scale: float) -> Row:
        guided = "" if scale == 1 else f", guidance {scale}"
        return Row(
            f"generate B{batch}, {tokens} tokens{guided}",
            lambda: model.generate(labels, guidance_scale=scale),
            batch * tokens,
            generation_bytes(model, batch * (1 if scale == 1 else 2)) * dtype.itemsize,
        )

    yield generate(1.0)
    yield generate(1.5)
    yield Row(
        f"train step B{batch}",
        train_step(model, {"indices": indices, "label": labels}, device, dtype),
        batch,
    )


def generation_bytes(model: Any, batch: int) -> float:
    """Numbers that generating all indices must read: every weight for every index (but the
    embedding's), and the keys and values before it."""
    weights = sum(p.numel() for part in (model.blocks, model.head) for p in part.parameters())
    cached = len(model.blocks) * 2 * model.positions.shape[1] * batch * (model.num_tokens + 1) / 2
    return model.num_tokens * (weights + cached)


def maskgit_rows(
    model: Any, batch: int, device: torch.device, dtype: torch.dtype, steps: int
) -> Iterator[Row]:
    tokens, labels = model.num_tokens, torch.zeros(batch, dtype=torch.long, device=device)
    indices = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    yield Row(f"generate B{batch}", lambda: model.generate(labels), batch * tokens)
    yield Row(
        f"train step B{batch}",
        train_step(model, {"indices": indices, "label": labels}, device, dtype),
        batch,
    )


def picture_rows(
    model: Any, batch: int, device: torch.device, dtype: torch.dtype, steps: int
) -> Iterator[Row]:
    """Any other tokenizer; its training wants pretrained networks, so is not measured."""
    images = torch.rand(batch, 3, model.image_size, model.image_size, device=device) * 2 - 1
    indices = torch.randint(0, model.vocab_size, (batch, model.num_tokens), device=device)
    yield Row(f"encode B{batch}", lambda: model.encode(images.to(dtype)), batch)
    yield Row(f"decode B{batch}", lambda: model.decode(indices), batch)


def train_step(
    model: Any, batch: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Loss, gradients and AdamW, in fp32 or mixed precision."""
    objective, optimizer = make_objective(model), None
    draws = torch.Generator().manual_seed(0)

    def step() -> None:
        nonlocal optimizer
        optimizer = optimizer or make_optimizer(objective, OptimConfig())  # after the last move
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = objective(batch, draws)["loss"]
        loss.backward()
        optimizer.step()

    return step


def measure_row(row: Row, machine: Machine, repeats: int, compare_mkl: bool = False) -> Result:
    device = torch.device(machine.device)
    reset_peak_memory(device)
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:  # warms up, too
        row.run()
    wall, cpu = measure(row.run, device, repeats)
    seconds, flops = busy_seconds(wall, cpu, device), float(counter.get_total_flops())
    share = None if row.bytes_read is None else row.bytes_read / seconds / machine.bandwidth
    rate = flops / seconds
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
        published_cpu=PUBLISHED.get(row.name),
        mkl_cpu=without_onednn(row, device, repeats) if compare_mkl else None,
    )


def without_onednn(row: Row, device: torch.device, repeats: int) -> float:
    with torch.backends.mkldnn.flags(enabled=False):
        return measure(row.run, device, repeats)[1]


HEADER = (
    f"{'row':45s} {'wall s':>8s} {'CPU s':>8s} {'GFLOP':>8s} {'GFLOP/s':>8s} {'of peak':>7s} "
    f"{'of mem.':>7s} {'items/s':>8s} {'GB':>5s} {'published':>9s}"
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
    ratio = "" if r.published_cpu is None else f"{r.published_cpu / r.cpu:.2f}x"
    mkl = (
        ""
        if r.mkl_cpu is None
        else f"  without oneDNN {r.mkl_cpu:.3f} CPU s, {r.mkl_cpu / r.cpu:.2f}x"
    )
    return (
        f"{r.row:45s} {r.wall:8.3f} {r.cpu:8.3f} {r.flops / 1e9:8.2f} "
        f"{r.flops_per_second / 1e9:8.1f} {r.matmul_share:7.0%} {memory:>7s} "
        f"{r.items_per_second:8.2f} {r.peak_memory / 1e9:5.1f} {ratio:>9s}{mkl}"
    )
