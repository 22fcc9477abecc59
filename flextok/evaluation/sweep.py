"""Quality against prefix length, decoder steps and guidance: a table, curves, coarse-to-fine
strips, and a map of what a prefix leaves open."""

import csv
import io
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextok import viz
from flextok.data.stream import collate
from flextok.draws import NOISE, SPREAD, derived_generator, row_generators
from flextok.evaluation.job import Cell, Options, decoding_of
from flextok.evaluation.metrics import to_8_bit
from flextok.evaluation.report import write_report
from flextok.evaluation.runner import evaluate
from flextok.evaluation.sources import Images, readable
from flextok.files import write_text
from flextok.pipeline import decode, encode, prefix_lengths
from flextok.tokenizers.base import Tokenizer

AXES = {
    "tokens": ("num_tokens", "tokens"),
    "bits": ("bits_per_pixel", "bits per pixel"),
    "time": ("seconds_per_picture", "seconds a picture (decoding)"),
}
LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "mse": "MSE", "rfid": "rFID"}
LABELS |= {"sharpness": "sharpness", "kid": "KID"}


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
    `num_pictures` images. Returns the report with the spread by prefix length added."""
    output = Path(output)
    lengths = lengths or prefix_lengths(tokenizer.num_tokens)
    no_choice: list[None] = [None]
    ways = list(product(steps or no_choice, guidance or no_choice))
    cells = [Cell(k, *way) for way in ways for k in lengths]
    report = evaluate(tokenizer, dataset, cells, options, output, names)
    source = Images(dataset, tokenizer.image_size)
    chosen = [i * len(source) // num_pictures for i in range(min(num_pictures, len(source)))]
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
            viz.save(plot(report["results"], key, label), output / f"{name}.png")
    return report


def draws_of(
    tokenizer: Tokenizer, batch: dict[str, Tensor], cells: list[Cell], options: Options, draws: int
) -> dict[int, Tensor]:
    """Prefix length -> (n, draws, 3, H, W): the same prefix decoded from several noises, the first
    being the evaluation's own."""
    numbers = batch["index"]
    indices = encode(tokenizer, batch["image"], numbers, options.seed)
    decoded = {}
    for cell in cells:
        kept = indices[:, : cell.num_tokens]
        way = decoding_of(tokenizer, cell, options, tokenizer.num_tokens)
        images = [decode(tokenizer, kept, way, row_generators(options.seed, NOISE, numbers))]
        for number in range(1, draws):
            rngs = [derived_generator(options.seed, SPREAD, int(i), number) for i in numbers]
            images.append(decode(tokenizer, kept, way, rngs))
        decoded[cell.num_tokens] = torch.stack([some.cpu() for some in images], dim=1)
    return decoded


def spread(images: Tensor) -> Tensor:
    """images: (n, draws, 3, H, W) in [-1, 1]. Returns the standard deviation over the draws in
    0..255 units, the channels' root mean square, (n, H, W)."""
    n, draws = images.shape[:2]
    pixels = to_8_bit(images.flatten(0, 1)).unflatten(0, (n, draws))
    return pixels.var(dim=1).mean(dim=1).sqrt()


def shown_scores(results: list[dict[str, Any]]) -> list[str]:
    """The scores that tables and plots show."""
    return [s for s in results[0]["scores"] if s in LABELS or s.startswith("frechet")]


def plot(results: list[dict[str, Any]], key: str, label: str) -> Any:
    """A panel for each score, a line for each way to decode."""
    ways: dict[str, list[dict[str, Any]]] = {}
    for r in results:
        way = f"{r['num_steps'] or '-'} steps, guidance {r['guidance_scale'] or '-'}"
        ways.setdefault(way, []).append(r)
    panels = {
        LABELS.get(score, score.replace("_", " ")): {
            way: sorted((r[key], r["scores"][score]) for r in some) for way, some in ways.items()
        }
        for score in shown_scores(results)
    }
    return viz.curves(panels, label, logarithmic=key != "seconds_per_picture")


def write_csv(report: dict[str, Any], path: Path) -> None:
    rows = [{**r, **r["scores"]} for r in report["results"]]
    text = io.StringIO(newline="")
    columns = [key for key in rows[0] if key != "scores"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def format_table(report: dict[str, Any]) -> str:
    """The sweep for a terminal."""
    results = report["results"]
    scores = shown_scores(results)
    head = ["tokens", "steps", "guidance", *(LABELS.get(s, s) for s in scores), "s/picture"]
    lines = ["  ".join(f"{h:>9}" for h in head)]
    for r in results:
        steps, scale = (r[k] if r[k] is not None else "-" for k in ("num_steps", "guidance_scale"))
        cells = [r["num_tokens"], steps, scale, *(f"{r['scores'][s]:.4g}" for s in scores)]
        cells.append(f"{r['seconds_per_picture']:.3f}")
        aligned = (f"{c:>{max(9, len(h))}}" for c, h in zip(cells, head, strict=True))
        lines.append("  ".join(aligned))
    gain = results[-1]["scores"]["psnr"] - results[0]["scores"]["psnr"]
    lines.append(f"{results[0]['count']} images; {gain:+.2f} dB from the first row to the last")
    return "\n".join(lines)
