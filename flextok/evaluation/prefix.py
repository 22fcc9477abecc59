"""Reconstruction quality against the number of tokens, in one pass over a data set."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok.data.datamodule import prepare_image
from flextok.data.stream import EvaluationSet, collate
from flextok.data.transforms import ImageTransform
from flextok.evaluation.metrics import mse, psnr
from flextok.pipeline import reconstruct_prefixes


@dataclass
class PrefixQuality:
    """Means over `count` pictures at one prefix length."""

    num_tokens: int
    psnr: float  # dB, mean of the pictures' PSNRs
    mse: float  # of 0..255 pixels
    count: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def prefix_quality(
    tokenizer: Any,
    dataset: Any,
    lengths: list[int],
    seed: int = 0,
    decoding: dict[str, Any] | None = None,
    batch_size: int = 64,
) -> list[PrefixQuality]:
    """Encode each readable picture once, decode every prefix length with the same noise, compare.
    decoding: keyword arguments of tokenizer.decode."""
    prepare = prepare_image(ImageTransform(tokenizer.image_size))
    loader = DataLoader(EvaluationSet(dataset, prepare), batch_size=batch_size, collate_fn=collate)
    device = next(tokenizer.parameters()).device
    scores: dict[int, list] = {k: [] for k in lengths}
    with torch.no_grad():
        for number, batch in enumerate(tqdm(loader, desc="reconstructing", unit="batch")):
            if not batch:
                continue
            images = batch["image"].to(device)
            decoded = reconstruct_prefixes(tokenizer, images, lengths, seed + number, decoding)
            for k, pictures in decoded.items():
                scores[k].append(torch.stack([psnr(pictures, images), mse(pictures, images)]))
    if not any(scores.values()):
        raise ValueError("no picture of the data set could be read")
    results = []
    for k, parts in scores.items():
        columns = torch.cat(parts, dim=1)
        means = columns.mean(dim=1).tolist()
        results.append(PrefixQuality(k, means[0], means[1], columns.shape[1]))
    return results


def format_table(results: list[PrefixQuality]) -> str:
    lines = ["tokens  PSNR (dB)      MSE"]
    lines += [f"{r.num_tokens:6d}  {r.psnr:9.2f}  {r.mse:7.0f}" for r in results]
    gain = results[-1].psnr - results[0].psnr
    lines.append(f"{results[0].count} pictures; {gain:+.2f} dB from the shortest to the longest")
    return "\n".join(lines)
