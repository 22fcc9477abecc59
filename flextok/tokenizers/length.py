"""How many tokens an image needs: the target that it has to meet, and a head that predicts the
answer from the encoder's registers, in one pass and without decoding.

KARL (arXiv 2507.07995) and STAT (arXiv 2601.14246) train an encoder that also predicts how many
tokens to keep. Here the encoder stays as it is: a small head learns how good the images decoded
from each prefix were, for every length that the search tries (evaluation/adaptive.py). So any
target can be asked for, and the answer is the shortest prefix whose predicted score meets it.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok.schema import ConfigError, Size, unknown_key

UNITS = {"psnr": "dB", "ssim": "", "lpips": "", "efficientnet_lite0": "", "inception": ""}
HIGHER_IS_BETTER = ("psnr", "ssim")


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


class Adaptive(NamedTuple):
    """Indices with the number that each image needs: decode(indices, keep=keep)."""

    indices: Tensor  # (B, K) long
    keep: Tensor  # (B,) long
    met: Tensor  # (B,) bool; False: not even all K tokens do, and keep is K
    value: Tensor  # (B,) float64, the target's metric at keep tokens, measured or predicted
    reason: list[str]  # for people: what was found, and at which lengths
    decodes: int  # of each image; 0 = predicted

    @classmethod
    def of(
        cls,
        target: Target,
        lengths: list[int],
        indices: Tensor,
        scores: Tensor,
        found: Tensor,
        decodes: int,
    ) -> "Adaptive":
        """scores: (B, n) float64, of the n lengths; found: (B,) long, the number of the shortest
        length that meets the target, n where none does."""
        chosen = found.clamp_max(len(lengths) - 1)
        reasons = [
            explain(target, lengths, row, number)
            for row, number in zip(scores.tolist(), found.tolist(), strict=True)
        ]
        keep, met = torch.tensor(lengths)[chosen], found < len(lengths)
        value = scores[torch.arange(len(scores)), chosen]
        return cls(indices, keep, met, value, reasons, decodes)


def explain(target: Target, lengths: list[int], tried: list[float], found: int) -> str:
    """Why the candidate number `found` (their count for none), from what was found at each."""
    last = min(found, len(lengths) - 1)
    text = target.describe(tried[last], lengths[last])
    if found == len(lengths):
        return f"not met: {text}, which are all tokens"
    if found == 0:
        return f"{text}, the shortest there is"
    return f"{text}, but {target.describe(tried[found - 1], lengths[found - 1])}"


@dataclass
class LengthHeadConfig:
    """Of a head that was fitted: evaluation.adaptive.fit_length_head writes it."""

    metric: str  # what it predicts: psnr, ssim or a distance, see Target
    lengths: list[Size] = field(default_factory=list)  # ascending; the last one is all tokens
    dim: Size = 128


class LengthHead(nn.Module):
    """The score of every prefix length from the registers, monotone in the length: the first score,
    plus increments that are at least 0."""

    scale: Tensor  # (), of the score; below 0 where less is better, 0 before the head is fitted

    def __init__(self, config: LengthHeadConfig, width: int, num_tokens: int):
        super().__init__()
        lengths, dim = config.lengths, config.dim
        if config.metric not in UNITS:
            raise unknown_key("length_head.metric", config.metric, list(UNITS))
        if lengths != sorted(set(lengths)) or lengths[-1:] != [num_tokens]:
            raise ConfigError(
                f"length_head.lengths={lengths} must ascend to all {num_tokens} tokens"
            )
        self.metric, self.lengths = config.metric, lengths
        self.first, self.middle = nn.Linear(2 * width, dim), nn.Linear(dim, dim)
        self.last = nn.Linear(dim, len(lengths))
        self.register_buffer("scale", torch.zeros(()))

    @staticmethod
    def summary(registers: Tensor) -> Tensor:
        """registers: (B, K, D), the encoder's outputs. Returns what the head reads, (B, 2 D): their
        mean and standard deviation over the sequence."""
        return torch.cat([registers.mean(dim=1), registers.std(dim=1, correction=0)], dim=1)

    def forward(self, summary: Tensor) -> Tensor:
        """summary: (B, 2 D). Returns the score of each length, (B, n)."""
        out = self.last(F.gelu(self.middle(F.gelu(self.first(summary)))))
        return self.scale * torch.cat([out[:, :1], F.softplus(out[:, 1:])], dim=1).cumsum(dim=1)

    def check(self, target: Target) -> None:
        """Raises ValueError where the head does not predict the target's metric."""
        if self.metric != target.metric:
            raise ValueError(
                f"target {target.metric}={target.value:g}: this tokenizer's length head predicts "
                f"{self.metric}. Fit one for {target.metric} ({HOW_TO_FIT})"
            )
        if not self.scale:
            raise ValueError(f"this tokenizer's length head is not fitted yet ({HOW_TO_FIT})")

    def choose(self, target: Target, indices: Tensor, registers: Tensor) -> Adaptive:
        """indices: (B, K); registers: (B, K, D), of the same images."""
        scores = self(self.summary(registers)).cpu().double()
        found = (~target.met(scores)).sum(dim=1)  # the scores are monotone
        return Adaptive.of(target, self.lengths, indices, scores, found, decodes=0)


HOW_TO_FIT = "flextok adaptive MODEL --target METRIC=VALUE --train IMAGES"
