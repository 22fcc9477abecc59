"""Guidance of a trained tokenizer's decoder: none, at all times, or in an interval of them.

    python experiments/guidance.py emoji --steps 8 --num-tokens 4 64 --seeds 0 1

Needs no training; the seeds are those of the noise. <output>/guidance.md sums up by setting and
number of tokens, guidance.json has all numbers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from study import score_tables, write_json

from flextok.emoji.datasets import Emoji
from flextok.evaluation import Cell, Options, evaluate
from flextok.pipeline import load

INTERVALS = ([0.0, 0.5], [0.2, 0.8], [0.5, 1.0])


def settings(steps: int) -> dict[str, dict[str, Any]]:
    """Name -> what it sets of the model's DecodeOptions."""
    found: dict[str, dict[str, Any]] = {}
    for number in dict.fromkeys((1, steps)):
        name = "1 step" if number == 1 else f"{number} steps"
        for scale in (1.0, 1.25, 1.5) if number == 1 else (1.0, 1.5):
            guided = f", scale {scale}" if scale > 1 else ""
            found[name + guided] = {"num_steps": number, "guidance_scale": scale}
    for low, high in INTERVALS if steps > 1 else ():
        found[f"{steps} steps, scale 1.5 in [{low}, {high}]"] = {
            "num_steps": steps,
            "guidance_scale": 1.5,
            "guidance_interval": [low, high],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="name, folder or hub id of a FlexTok")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num-tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--networks", nargs="+", default=["efficientnet_lite0"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("outputs/guidance"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, dataset = load(options.model), Emoji("validation")
    model.drop_drawer()  # another decoder, with guidance of its own
    cells = [Cell(k) for k in options.num_tokens]
    results: dict[str, list[dict[str, Any]]] = {}
    for name, changes in settings(options.steps).items():
        print(f"== {name}", flush=True)
        for key, value in ({"guidance_interval": None} | changes).items():
            setattr(model.config.decode, key, value)
        for seed in options.seeds:
            how = Options(networks=tuple(options.networks), seed=seed)
            report = evaluate(model, dataset, cells, how)
            results.setdefault(name, []).append({"decode": changes, "report": report})
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(results, options.output / "guidance.json")
    text = score_tables(results)
    (options.output / "guidance.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
