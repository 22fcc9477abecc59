"""How many tokens does this picture need? The shortest prefix that is good enough, per picture.

The candidates are 1, 2, 4, ... and all K tokens. Bisection finds the shortest one that meets the
target in at most ceil(log2(candidates + 1)) decodes (4 for K = 256), which supposes that quality
rises with the prefix. Whatever comes back was decoded and meets the target (or no candidate that
was tried did); the next shorter candidate was decoded too and does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flextok.data.datasets import labels_count
from flextok.evaluation import passes
from flextok.evaluation.features import load_networks
from flextok.evaluation.job import Options
from flextok.evaluation.metrics import psnr, ssim, to_8_bit
from flextok.pipeline import prefix_lengths
from flextok.schema import unknown_key

Measure = Callable[[Tensor, Tensor], Tensor]  # decoded, images (B, 3, H, W) -> (B,)
UNITS = {"psnr": "dB", "ssim": "", "lpips": "", "efficientnet_lite0": "", "inception": ""}
HIGHER_IS_BETTER = ("psnr", "ssim")


@dataclass(frozen=True)
class Target:
    """What a picture has to meet: psnr or ssim of at least `value`, or at most this distance: lpips
    or 1 - the cosine of efficientnet_lite0's or inception's features."""

    metric: str
    value: float

    def __post_init__(self) -> None:
        if self.metric not in UNITS:
            raise unknown_key("target", self.metric, list(UNITS))
        if not math.isfinite(self.value):
            raise ValueError(f"target {self.metric}={self.value} must be finite")

    @classmethod
    def parse(cls, text: str) -> "Target":
        """ "psnr=20" -> Target("psnr", 20.0)."""
        metric, equals, value = text.partition("=")
        try:
            return cls(metric, float(value))
        except ValueError:
            if equals and metric not in UNITS:
                raise
            raise ValueError(f"target {text!r} must look like psnr=20 or lpips=0.3") from None

    def met(self, values: Tensor) -> Tensor:
        higher = self.metric in HIGHER_IS_BETTER
        return values >= self.value if higher else values <= self.value

    def describe(self, value: float, tokens: int) -> str:
        return f"{self.metric} {value:.4g} {UNITS[self.metric]}".rstrip() + f" at {tokens}"

    def measure(self, device: torch.device, dtype: torch.dtype) -> Measure:
        """The function that compares pictures, with its network loaded. Raises ValueError where the
        weights are missing."""
        if self.metric in HIGHER_IS_BETTER:
            return {"psnr": psnr, "ssim": ssim}[self.metric]
        networks = load_networks([self.metric], device, dtype)
        if networks.lpips is not None:
            return lambda a, b: passes.lpips(networks, a, b)
        (network,) = networks.features

        def distance(a: Tensor, b: Tensor) -> Tensor:
            ours, theirs = (network(to_8_bit(x)).pooled.cpu().double() for x in (a, b))
            return 1 - F.cosine_similarity(ours, theirs, dim=-1)

        return distance


class Adaptive(NamedTuple):
    """Indices with the number that each picture needs: decode(indices, keep=keep)."""

    indices: Tensor  # (B, K) long
    keep: Tensor  # (B,) long
    met: Tensor  # (B,) bool; False: not even all K tokens do, and keep is K
    value: Tensor  # (B,) float64, the target's metric at keep tokens
    reason: list[str]  # for people: what was measured, and at which lengths
    decodes: int  # of each picture


def encode(
    tokenizer: Any,
    images: Tensor,
    target: Target | str,
    measure: Measure | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    decoding: dict[str, Any] | None = None,
) -> Adaptive:
    """images: (B, 3, H, W) in [-1, 1]. Finds the shortest prefix of each picture that meets the
    target, such as "psnr=20".

    measure: target.measure(...), to load its network once for many calls. noise: (B, C, h, w), by
    default of pictures 0 .. B-1 under `seed`; the same for every prefix of a picture. decoding: for
    decode(). Raises ValueError for a target that cannot be read and for a tokenizer that decodes no
    prefixes."""
    target = Target.parse(target) if isinstance(target, str) else target
    parameter = next(tokenizer.parameters())
    images = images.to(parameter.device)
    measure = measure or target.measure(parameter.device, parameter.dtype)
    indices = passes.encode(tokenizer, images)
    if noise is None:
        noise = passes.noise_of(tokenizer, torch.arange(len(images)), seed)
    lengths = torch.tensor(prefix_lengths(tokenizer.num_tokens))
    # the answer is in [low, high]; high = number of candidates means that none does
    low = torch.zeros(len(images), dtype=torch.long)
    high = torch.full_like(low, len(lengths))
    tried = torch.full((len(images), len(lengths)), math.nan, dtype=torch.float64)
    decodes = 0
    while len(rows := (low < high).nonzero()[:, 0]):  # pictures that are not settled yet
        middle = (low[rows] + high[rows]) // 2
        options = dict(decoding or {})
        if noise is not None:
            options["noise"] = noise[rows]
        decoded = tokenizer.decode(indices[rows], keep=lengths[middle], **options)
        values = measure(decoded, images[rows]).cpu().double()
        tried[rows, middle] = values
        good = target.met(values)
        high[rows] = torch.where(good, middle, high[rows])
        low[rows] = torch.where(good, low[rows], middle + 1)
        decodes += 1
    chosen = high.clamp_max(len(lengths) - 1)
    reasons = [
        explain(target, lengths.tolist(), row, found)
        for row, found in zip(tried.tolist(), high.tolist(), strict=True)
    ]
    return Adaptive(
        indices,
        lengths[chosen],
        met=high < len(lengths),
        value=tried[torch.arange(len(images)), chosen],
        reason=reasons,
        decodes=decodes,
    )


def explain(target: Target, lengths: list[int], tried: list[float], found: int) -> str:
    """Why the candidate number `found` (their count for none), from what was measured at each."""
    last = min(found, len(lengths) - 1)
    text = target.describe(tried[last], lengths[last])
    if found == len(lengths):
        return f"not met: {text}, which are all tokens"
    if found == 0:
        return f"{text}, the shortest there is"
    return f"{text}, but {target.describe(tried[found - 1], lengths[found - 1])}"


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two (n,) arrays; ties share their mean rank. 0 if one is constant."""
    x, y = mean_ranks(a), mean_ranks(b)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def mean_ranks(x: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def relate(
    tokenizer: Any,
    dataset: Any,
    target: Target,
    options: Options,
    decoding: dict[str, Any] | None = None,
    shuffles: int = 1000,
) -> dict[str, Any]:
    """The experiment: how many tokens each picture of a data set needs and, where its labels count
    something (emoji_scenes: the objects), whether the length follows them: "complexity", else None.
    """
    source = passes.Numbered(dataset, tokenizer.image_size)
    parameter = next(tokenizer.parameters())
    measure = target.measure(parameter.device, parameter.dtype)
    keeps, labels, met, reasons, decodes = [], [], [], [], 0
    for batch in passes.batches(source, options, "searching prefixes"):
        noise = passes.noise_of(tokenizer, batch["index"], options.seed)
        found = encode(tokenizer, batch["image"], target, measure, noise, decoding=decoding)
        keeps += found.keep.tolist()
        labels += batch["label"].tolist()
        met += found.met.tolist()
        reasons += found.reason
        decodes = max(decodes, found.decodes)
    if not keeps:
        raise ValueError("no picture of the data set could be read; see the warnings above")
    follows = None
    if labels_count(dataset):
        arrays = (np.array(keeps), np.array(met), np.array(labels))
        follows = complexity(*arrays, tokenizer.num_tokens, options.seed, shuffles)
    return {
        "target": f"{target.metric}={target.value:g}",
        "count": len(keeps),
        "met": int(np.sum(met)),
        "decodes_per_picture": decodes,
        "mean_tokens": float(np.mean(keeps)),
        "complexity": follows,
        "pictures": [
            {"label": a, "keep": b, "reason": c}
            for a, b, c in zip(labels, keeps, reasons, strict=True)
        ],
    }


def complexity(
    keeps: np.ndarray,
    met: np.ndarray,
    labels: np.ndarray,
    num_tokens: int,
    seed: int,
    shuffles: int,
) -> dict[str, Any]:
    """Spearman's rank correlation of lengths and labels, all (n,), against the same with labels
    shuffled `shuffles` times; and the mean length for each label."""
    # an image that not even all tokens satisfy needs more than any that they do
    length = np.where(met, keeps, 2 * num_tokens)
    draws = np.random.default_rng(seed)
    control = np.array([spearman(length, draws.permutation(labels)) for _ in range(shuffles)])
    value = spearman(length, labels)
    return {
        "spearman": value,
        "shuffled": {
            "shuffles": shuffles,
            "first": float(control[0]),
            "mean": float(control.mean()),
            "std": float(control.std()),
            "p_value": float((1 + (np.abs(control) >= abs(value)).sum()) / (1 + shuffles)),
        },
        "by_label": {
            str(one): {
                "count": int((labels == one).sum()),
                "mean_tokens": float(keeps[labels == one].mean()),
                "met": float(met[labels == one].mean()),
            }
            for one in np.unique(labels)
        },
    }
