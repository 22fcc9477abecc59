"""Times encoding, decoding and generation at the published sizes, random weights, fp32.

    python benchmarks/speed.py [--threads 1] [--only encode] [--json benchmarks/results/speed.json]

Prints wall and CPU seconds a call, the best of --repeats, beside the figures measured for the
published implementations' modules on the development CPU (two shared cores): compare CPU seconds
with --threads 1. FlexTok: latents [B, 16, 32, 32], i.e. 256 px; the VAE is not part of these rows.
TiTok: pictures of 256 px; MaskGIT with the published sampling settings.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from flextok.config import load_experiment
from flextok.generators import GENERATORS, GPT, GPTConfig
from flextok.tokenizers import TOKENIZERS, FlexTok, FlexTokConfig
from flextok.training.run import build_model

CONFIGS = Path(__file__).parent.parent / "configs"

LATENTS = {"name": "kl", "block_channels": [32, 32, 32, 32]}  # 16 channels, f8; never run here

# CPU seconds with one thread of the published modules; AR: tokens a second, wall, two threads
REFERENCE = {
    "encode d12-d12 B1": 1.28,
    "encode d12-d12 B4": 7.89,
    "decode d12-d12 B1, 4 steps": 6.1,
    "decode d12-d12 B4, 4 steps": 32.8,
    "decode d12-d12 B1, 4 steps, keep 1": 6.07,
    "decode d12-d12 B1, 4 steps, APG": 13.0,
    "encode d18-d28 B1": 3.90,
    "forward d18-d28 B1": 19.2,
    "generate AR 49M B1, 256 tokens": 108.8,
    "generate AR 49M B1, 256 tokens, guidance 1.5": 212.9,
    "encode TiTok s128 B1": 0.298,
    "encode TiTok b64 B1": 0.986,
    "encode TiTok l32 B1": 2.90,
    "encode TiTok b64 B8": 7.08,
    "encode TiTok l32 B8": 21.0,
    "decode TiTok s128 B1": 3.48,
    "decode TiTok b64 B1": 4.70,
    "decode TiTok l32 B1": 6.36,
    "generate MaskGIT l32 B4, 8 steps": 14.6,
    "generate MaskGIT b64 B4, 8 steps": 22.6,
}


def flextok_rows(depths: tuple[int, int], only: str) -> dict[str, Callable[[], object]]:
    name = f"d{depths[0]}-d{depths[1]}"
    model = FlexTok(
        FlexTokConfig(encoder_depth=depths[0], decoder_depth=depths[1], vae=LATENTS)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 16, 32, 32, generator=generator)
    indices = torch.randint(0, model.vocab_size, (4, 256), generator=generator)
    model.vae.decode = lambda x: x  # the rows are about the latents

    def encode(batch: int) -> Callable[[], object]:
        return lambda: model.quantizer(model.encoder(latents[:batch]))

    def decode(batch: int, scale: float = 1.0, keep: int | None = None) -> Callable[[], object]:
        return lambda: model.decode(
            indices[:batch], keep, num_steps=4, guidance_scale=scale, noise=latents[:batch]
        )

    rows = {f"encode {name} B1": encode(1)}
    if depths == (12, 12):
        rows |= {
            f"encode {name} B4": encode(4),
            f"decode {name} B1, 4 steps": decode(1),
            f"decode {name} B4, 4 steps": decode(4),
            f"decode {name} B1, 4 steps, keep 1": decode(1, keep=1),
            f"decode {name} B1, 4 steps, APG": decode(1, scale=7.5),
        }
    else:
        registers, mask = model.decoder.embed_codes(model.quantizer.indices_to_codes(indices[:1]))
        time_ = torch.tensor(0.5)
        rows[f"forward {name} B1"] = lambda: model.velocity(latents[:1], time_, registers, mask)
    return {row: run for row, run in rows.items() if only in row}


def gpt_rows(only: str) -> dict[str, Callable[[], object]]:
    model = GPT(GPTConfig(depth=10)).eval()
    label = torch.tensor([1])

    def generate(scale: float) -> Callable[[], object]:
        return lambda: model.generate(
            label, guidance_scale=scale, generator=torch.Generator().manual_seed(0)
        )

    rows = {
        "generate AR 49M B1, 256 tokens": generate(1.0),
        "generate AR 49M B1, 256 tokens, guidance 1.5": generate(1.5),
    }
    return {row: run for row, run in rows.items() if only in row}


def titok_rows(name: str, only: str) -> dict[str, Callable[[], object]]:
    batches = {"s128": (1,), "b64": (1, 8), "l32": (1, 8)}[name]
    rows = [f"encode TiTok {name} B{batch}" for batch in batches] + [f"decode TiTok {name} B1"]
    if not any(only in row for row in rows):
        return {}
    config = load_experiment(CONFIGS / f"titok_{name}_stage2.yaml")
    model = build_model(TOKENIZERS, config.model).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 256, 256, generator=generator) * 2 - 1
    indices = torch.randint(0, model.vocab_size, (1, model.num_tokens), generator=generator)

    def encode(batch: int) -> Callable[[], object]:
        return lambda: model.encode(images[:batch])

    runs = [*(encode(batch) for batch in batches), lambda: model.decode(indices)]
    return {row: run for row, run in zip(rows, runs, strict=True) if only in row}


def maskgit_rows(name: str, only: str) -> dict[str, Callable[[], object]]:
    row = f"generate MaskGIT {name} B4, 8 steps"
    if only not in row:
        return {}
    spec = load_experiment(CONFIGS / f"maskgit_titok_{name}.yaml").model
    model = build_model(GENERATORS, {**spec, "vocab_size": 4096, "num_tokens": int(name[1:])})
    draws = torch.Generator().manual_seed(0)
    return {row: lambda: model.eval().generate(torch.arange(4), generator=draws, num_steps=8)}


@torch.no_grad()
def measure(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best wall and CPU seconds of a call, after one call to warm up."""
    run()
    best_wall = best_cpu = float("inf")
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, time.process_time() - cpu)
    return best_wall, best_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--large", action="store_true", help="d18-d28 too (needs 10 GB of memory)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [(12, 12), *([(18, 28)] if options.large else [])]
    results = []
    print(f"{'row':48s} {'wall s':>8s} {'CPU s':>8s} {'published':>10s} {'ratio':>6s}")

    def report(rows: dict[str, Callable[[], object]]) -> None:
        for row, run in rows.items():
            wall, cpu = measure(run, options.repeats)
            reference = REFERENCE[row]
            print(f"{row:48s} {wall:8.2f} {cpu:8.2f} {reference:10.2f} {reference / cpu:6.2f}")
            results.append({"row": row, "wall": wall, "cpu": cpu, "published_cpu": reference})
            if row.startswith("generate AR"):
                print(f"{'':48s} {256 / wall:.1f} tokens/s")

    for depths in sizes:
        report(flextok_rows(depths, options.only))
    report(gpt_rows(options.only))
    for name in ("s128", "b64", "l32"):
        report(titok_rows(name, options.only))
    for name in ("l32", "b64"):
        report(maskgit_rows(name, options.only))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "torch": torch.__version__,
            "threads": options.threads,
            "machine": platform.machine(),
            "results": results,
        }
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
