"""One budget, four layouts of tokens: FlexTok, TiTok, TiTok with tail drop (One-D-Piece) and a 2D
grid, at 8, 16, 32 and 64 tokens of 9 bits on the emoji.

    python benchmarks/compare_tokenizers.py [--steps 600] [--json benchmarks/results/compare.json]

All are trained on the same pictures for the same steps with the same batch, and have the same
number of parameters within 10 %. FlexTok and tail drop are one model each for every length; TiTok
and the grid are trained anew for each. Prints PSNR and a Frechet distance over the validation
emoji. The distance is in the features of EfficientNet-Lite0 (ImageNet), which come from PyPI: it
is no FID. Runs are kept in outputs/compare and go on where they stopped.
"""

import argparse
import json
import sys
from pathlib import Path

from flextok.config import ExperimentConfig, load_experiment

sys.path.append(str(Path(__file__).parent.parent / "experiments"))
from study import train_and_measure

CONFIGS = Path(__file__).parent.parent / "configs"
GRIDS = {8: [2, 4], 16: [4, 4], 32: [4, 8], 64: [8, 8]}
LENGTHS = list(GRIDS)


def runs() -> dict[str, list[tuple[str, list[str], list[int]]]]:
    """Layout: its runs, each a config, overrides, and the lengths that the model is measured at."""
    tail = ["model.ordered=true"]
    grid = "model.ordered=false"
    return {
        "FlexTok": [("compare_flextok", [], LENGTHS)],
        "TiTok": [("compare_titok", [f"model.num_tokens={k}"], [k]) for k in LENGTHS],
        "TiTok, tail drop": [("compare_titok", tail, LENGTHS)],
        "2D grid": [
            (
                "compare_flextok",
                [grid, f"model.token_grid={cells}", f"model.num_registers={k}"],
                [k],
            )
            for k, cells in GRIDS.items()
        ],
    }


def run_config(
    layout: str, config: str, overrides: list[str], steps: int, folder: Path
) -> ExperimentConfig:
    name = "_".join([layout, *(part.split("=")[1] for part in overrides)])
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    overrides = [*overrides, f"output_dir={place}", f"trainer.max_steps={steps}"]
    return load_experiment(CONFIGS / f"{config}.yaml", overrides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    rows, count = [], 0
    for layout, models in runs().items():
        for name, overrides, lengths in models:
            config = run_config(layout, name, overrides, options.steps, options.output)
            measured = train_and_measure(config, lengths, ["efficientnet_lite0"])
            for result in measured["report"]["results"]:
                count, scores = result["count"], result["scores"]
                rows.append(
                    {
                        "layout": layout,
                        "tokens": result["num_tokens"],
                        "psnr": scores["psnr"],
                        "frechet_efficientnet_lite0": scores["frechet_efficientnet_lite0"],
                        "parameters": measured["parameters"],
                    }
                )
    sizes = [row["parameters"] for row in rows]
    if max(sizes) > 1.1 * min(sizes):
        raise SystemExit(f"parameters from {min(sizes):,} to {max(sizes):,}: over 10 % apart")
    print(f"{options.steps} steps of 16, {count} validation emoji; PSNR (dB) / Frechet")
    print("| layout | parameters | " + " | ".join(f"{k} tokens" for k in LENGTHS) + " |")
    print("|---|---|" + "---|" * len(LENGTHS))
    for layout in runs():
        mine = {row["tokens"]: row for row in rows if row["layout"] == layout}
        cells = [f"{r['psnr']:.2f} / {r['frechet_efficientnet_lite0']:.1f}" for r in mine.values()]
        print(f"| {layout} | {mine[64]['parameters'] / 1e6:.2f}M | {' | '.join(cells)} |")
    if options.json:
        facts = {"steps": options.steps, "pictures": count, "results": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
