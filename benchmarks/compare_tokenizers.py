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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flextok.card import count_parameters
from flextok.config import load_experiment
from flextok.data.datamodule import prepare_image
from flextok.data.stream import EvaluationSet, collate
from flextok.data.transforms import ImageTransform
from flextok.evaluation.distances import Statistics, frechet_distance, statistics
from flextok.evaluation.features import EfficientNetLite0
from flextok.evaluation.metrics import psnr
from flextok.pipeline import load_model, reconstruct_prefixes
from flextok.training.run import make_dataset, train

CONFIGS = Path(__file__).parent.parent / "configs"
GRIDS = {8: [2, 4], 16: [4, 4], 32: [4, 8], 64: [8, 8]}
LENGTHS = list(GRIDS)


def runs() -> dict[str, list[tuple[str, list[str], list[int]]]]:
    """Layout: its runs, each a config, overrides, and the lengths that the model is measured at."""
    tail = ["model.nested_dropout=uniform"]
    grid = "model.nested_dropout=none"
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


def train_run(layout: str, config: str, overrides: list[str], steps: int, folder: Path) -> Any:
    name = "_".join([layout, *(part.split("=")[1] for part in overrides)])
    place = folder / "".join(c if c.isalnum() else "_" for c in name)
    overrides = [*overrides, f"output_dir={place}", f"trainer.max_steps={steps}"]
    return load_model(train(load_experiment(CONFIGS / f"{config}.yaml", overrides)))


def validation_pictures(size: int) -> Tensor:
    dataset = make_dataset({"name": "emoji", "split": "validation"})
    pictures = EvaluationSet(dataset, prepare_image(ImageTransform(size)))
    return next(iter(DataLoader(pictures, batch_size=len(pictures), collate_fn=collate)))["image"]


def features(network: Any, images: Tensor) -> Statistics:
    """images: (n, 3, H, W) in [-1, 1]. Statistics of the features of the pictures as 8 bits."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round()
    return statistics(torch.cat([network(part).pooled for part in pixels.split(16)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    images, network = validation_pictures(32), EfficientNetLite0("cpu", torch.float32)
    real = features(network, images)
    rows = []
    for layout, models in runs().items():
        for config, overrides, lengths in models:
            model = train_run(layout, config, overrides, options.steps, options.output)
            for k, pictures in reconstruct_prefixes(model, images, lengths).items():
                rows.append(
                    {
                        "layout": layout,
                        "tokens": k,
                        "psnr": psnr(pictures, images).mean().item(),
                        "frechet_efficientnet_lite0": frechet_distance(
                            features(network, pictures), real
                        ),
                        "parameters": count_parameters(model),
                    }
                )
    sizes = [row["parameters"] for row in rows]
    if max(sizes) > 1.1 * min(sizes):
        raise SystemExit(f"parameters from {min(sizes):,} to {max(sizes):,}: over 10 % apart")
    print(f"{options.steps} steps of 16, {len(images)} validation emoji; PSNR (dB) / Frechet")
    print("| layout | parameters | " + " | ".join(f"{k} tokens" for k in LENGTHS) + " |")
    print("|---|---|" + "---|" * len(LENGTHS))
    for layout in runs():
        mine = {row["tokens"]: row for row in rows if row["layout"] == layout}
        cells = [f"{r['psnr']:.2f} / {r['frechet_efficientnet_lite0']:.1f}" for r in mine.values()]
        print(f"| {layout} | {mine[64]['parameters'] / 1e6:.2f}M | {' | '.join(cells)} |")
    if options.json:
        facts = {"steps": options.steps, "pictures": len(images), "results": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
