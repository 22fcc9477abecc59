"""How many tokens does this image need? The shortest prefix that is good enough, per image.

The candidates are 1, 2, 4, ... and all K tokens. Bisection finds the shortest one that meets the
target in at most ceil(log2(candidates + 1)) decodes (4 for K = 256), which supposes that quality
rises with the prefix. Whatever comes back was decoded and meets the target (or no candidate that
was tried did); the next shorter candidate was decoded too and does not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flextok.data.sets import labels_count
from flextok.draws import NOISE, row_generators
from flextok.evaluation import sources
from flextok.evaluation.evaluators import EVALUATORS, Comparison, FeatureDistances, Setting
from flextok.evaluation.job import Options
from flextok.pipeline import prefix_lengths
from flextok.schema import unknown_key
from flextok.tokenizers.base import Tokenizer, encode_rows

Compare = Callable[[Tensor, Tensor], Tensor]  # decoded, images (B, 3, H, W) -> (B,)
UNITS = {"psnr": "dB", "ssim": "", "lpips": "", "efficientnet_lite0": "", "inception": ""}
HIGHER_IS_BETTER = ("psnr", "ssim")
SHUFFLES = 1000  # of the labels, for the control


@dataclass(frozen=True)
class Target:
    """What an image has to meet: psnr or ssim of at least `value`, or at most this distance: lpips
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

    def compare(self, device: torch.device, dtype: torch.dtype) -> Compare:
        """The function that compares images, with its network loaded. Raises ValueError where the
        weights are missing."""
        evaluator = EVALUATORS[self.metric](Setting(device, dtype))
        assert isinstance(evaluator, Comparison | FeatureDistances), f"{self.metric} has no pairs"
        return evaluator.compare


class Adaptive(NamedTuple):
    """Indices with the number that each image needs: decode(indices, keep=keep)."""

    indices: Tensor  # (B, K) long
    keep: Tensor  # (B,) long
    met: Tensor  # (B,) bool; False: not even all K tokens do, and keep is K
    value: Tensor  # (B,) float64, the target's metric at keep tokens
    reason: list[str]  # for people: what was measured, and at which lengths
    decodes: int  # of each image


def encode(
    tokenizer: Tokenizer,
    images: Tensor,
    target: Target | str,
    compare: Compare | None = None,
    rows: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    decoding: Mapping[str, Any] | None = None,
) -> Adaptive:
    """images: (B, 3, H, W) in [-1, 1]. Finds the shortest prefix of each image that meets the
    target, such as "psnr=20".

    compare: target.compare(...), to load its network once for many calls. rows: the images'
    numbers, 0 .. B-1 by default; an image's noise depends on its number and `seed` and is the same
    for each of its prefixes. decoding: options of decode(). Raises ValueError for a target that
    cannot be read and for a tokenizer that decodes no prefixes."""
    target = Target.parse(target) if isinstance(target, str) else target
    parameter = next(tokenizer.parameters())
    images = images.to(parameter.device)
    compare = compare or target.compare(parameter.device, parameter.dtype)
    numbers = torch.arange(len(images)) if rows is None else torch.as_tensor(rows)
    options = tokenizer.decode_options(decoding or {})
    indices = encode_rows(tokenizer, images, seed, numbers)
    lengths = torch.tensor(prefix_lengths(tokenizer.num_tokens))
    # the answer is in [low, high]; high = number of candidates means that none does
    low = torch.zeros(len(images), dtype=torch.long)
    high = torch.full_like(low, len(lengths))
    tried = torch.full((len(images), len(lengths)), math.nan, dtype=torch.float64)
    decodes = 0
    while len(unsettled := (low < high).nonzero()[:, 0]):  # images that are not settled yet
        middle = (low[unsettled] + high[unsettled]) // 2
        draws = row_generators(seed, NOISE, numbers[unsettled])
        decoded = tokenizer.decode(
            indices[unsettled], keep=lengths[middle], options=options, generator=draws
        )
        values = compare(decoded, images[unsettled]).cpu().double()
        tried[unsettled, middle] = values
        good = target.met(values)
        high[unsettled] = torch.where(good, middle, high[unsettled])
        low[unsettled] = torch.where(good, low[unsettled], middle + 1)
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


def relate(tokenizer: Tokenizer, dataset: Any, target: Target, options: Options) -> dict[str, Any]:
    """The experiment: how many tokens each image of a data set needs and, where its labels count
    something (emoji_scenes: the objects), whether the length follows them: "complexity", else None.
    """
    source = sources.Images(dataset, tokenizer.image_size)
    parameter = next(tokenizer.parameters())
    compare = target.compare(parameter.device, parameter.dtype)
    images: list[dict[str, Any]] = []
    met: list[bool] = []
    decodes = 0
    for batch in sources.batches(source, options, "searching prefixes"):
        found = encode(
            *(tokenizer, batch["image"], target, compare, batch["index"], options.seed),
            options.decoding,
        )
        columns = (batch["label"].tolist(), found.keep.tolist(), found.reason)
        images += [{"label": a, "keep": b, "reason": c} for a, b, c in zip(*columns, strict=True)]
        met += found.met.tolist()
        decodes = max(decodes, found.decodes)
    keeps = torch.tensor([image["keep"] for image in images])
    follows = None
    if labels_count(dataset):
        labels = torch.tensor([image["label"] for image in images])
        how = (tokenizer.num_tokens, options.seed)
        follows = complexity(keeps, torch.tensor(met), labels, *how)
    return {
        "target": f"{target.metric}={target.value:g}",
        "count": len(images),
        "met": sum(met),
        "decodes_per_picture": decodes,
        "mean_tokens": float(keeps.double().mean()),
        "complexity": follows,
        "pictures": images,
    }


def complexity(
    keeps: Tensor, met: Tensor, labels: Tensor, num_tokens: int, seed: int
) -> dict[str, Any]:
    """Spearman's rank correlation of lengths and labels, all (n,), against the same with labels
    shuffled SHUFFLES times; and the mean length for each label."""
    # an image that not even all tokens satisfy needs more than any that they do
    length = torch.where(met, keeps, 2 * num_tokens)
    rng = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=rng) for _ in range(SHUFFLES)]
    value = spearman(length, labels)
    control = torch.tensor([spearman(length, labels[order]) for order in orders]).double()
    return {
        "spearman": value,
        "shuffled": {
            "shuffles": SHUFFLES,
            "first": float(control[0]),
            "mean": float(control.mean()),
            "std": float(control.std(correction=0)),
            "p_value": float((1 + (control.abs() >= abs(value)).sum()) / (1 + SHUFFLES)),
        },
        "by_label": {
            str(one): {
                "count": int((labels == one).sum()),
                "mean_tokens": float(keeps[labels == one].double().mean()),
                "met": float(met[labels == one].double().mean()),
            }
            for one in labels.unique().tolist()
        },
    }


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two (n,) tensors; ties share their mean rank. 0 if one is constant."""
    from torchmetrics.functional import spearman_corrcoef

    return float(spearman_corrcoef(a.double(), b.double()))
