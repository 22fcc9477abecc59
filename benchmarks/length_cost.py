"""Draws what decoding costs against the tokens kept, and generating against the length.

    python benchmarks/length_cost.py [--threads 1] [--output benchmarks/results/length_cost]

d12-d12 on 256 px latents, one Euler step with and without guidance, and AR 49M, batch 1, random
weights. Writes <output>.png and <output>.json: CPU seconds, the best of --repeats.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from flextok import viz
from flextok.bench import SIZES, measure
from flextok.cli.options import write_json
from flextok.generators import GENERATORS
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS

CPU = torch.device("cpu")


def decode_costs(lengths: list[int], scale: float, repeats: int) -> list[tuple[int, float]]:
    model = build_model(TOKENIZERS, SIZES["d12-d12"][0]).eval()
    model.vae.decode = lambda latents: latents
    indices = torch.zeros(1, 256, dtype=torch.long)

    def cost(k: int) -> float:
        options = {"num_steps": 1, "guidance_scale": scale, "guidance": "apg"}
        return measure(lambda: model.decode(indices[:, :k], **options), CPU, repeats)[1]

    cost(1)  # warms up
    return [(k, cost(k)) for k in lengths]


def generation_costs(scale: float, repeats: int) -> list[tuple[int, float]]:
    """CPU seconds from the start until so many indices are there, from one run."""
    model = build_model(GENERATORS, SIZES["ar-49M"][0]).eval()
    runs = []
    for _ in range(repeats):
        began, reached = time.process_time(), []
        model.generate(
            torch.tensor([1]),
            guidance_scale=scale,
            callback=lambda done, _: reached.append((done, time.process_time() - began)),  # noqa: B023
        )
        runs.append(reached)
    return min(runs, key=lambda reached: reached[-1][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/length_cost"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lengths = [1, 16, 32, 64, 96, 128, 160, 192, 224, 255, 256]
    costs = {
        "decoder step, CPU s, against tokens kept": {
            "no guidance": decode_costs(lengths, 1.0, options.repeats),
            "APG": decode_costs(lengths, 7.5, options.repeats),
        },
        "generation, CPU s, against indices": {
            "no guidance": generation_costs(1.0, options.repeats),
            "guidance 1.5": generation_costs(1.5, options.repeats),
        },
    }
    viz.save(viz.curves({"": costs}, "tokens", logarithmic=False), f"{options.output}.png")
    facts = {"torch": torch.__version__, "threads": options.threads, "costs": costs}
    write_json(f"{options.output}.json", facts)


if __name__ == "__main__":
    main()
