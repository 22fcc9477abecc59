"""Conditions of a generator behind one small interface: conditioner(cond, drop) -> Condition.

A class adds its embedding to the start token (as the published FlexTok AR models do); the null
condition adds zero, or an embedding of its own (as in the published MaskGIT models).

    cond = conditioner.prepare(raw, device)  # as a user or a batch gives them
    condition = conditioner(cond, drop)      # what the transformer reads
    null = conditioner.null_like(cond)       # for guidance
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NULL_CLASS = -1  # as a label: no condition


class Condition(NamedTuple):
    """What a transformer needs of a condition."""

    start: Tensor  # (B, D), added to the start token
    context: Any = None  # values (B, L, D) to attend to, mask (B, L) bool, and their own join

    def join(self, other: "Condition") -> "Condition":
        """Both batches, one after the other."""
        start = torch.cat([self.start, other.start])
        if self.context is None or other.context is None:
            return Condition(start)
        return Condition(start, self.context.join(other.context))


class NoConditioner(nn.Module):
    """Unconditional generation; cond only says how many: (B,) of anything."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def prepare(self, cond: Tensor, device: torch.device) -> Tensor:
        return cond.to(device)

    def forward(self, cond: Tensor, drop: Tensor | None = None) -> Condition:
        return Condition(torch.zeros(len(cond), self.dim, device=cond.device))

    def null_like(self, cond: Tensor) -> Tensor:
        return cond


class ClassConditioner(nn.Module):
    """Labels (B,) long in [0, num_classes), or -1 for the null condition."""

    def __init__(self, dim: int, num_classes: int, learned_null: bool = False):
        """learned_null: the null condition is one more embedding, the last, instead of zero."""
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.num_classes, self.learned_null = num_classes, learned_null
        self.embedding = nn.Embedding(num_classes + learned_null, dim)

    def prepare(self, cond: Tensor, device: torch.device) -> Tensor:
        if not isinstance(cond, Tensor):
            raise ValueError(f"this generator takes class labels, a (B,) tensor, not {cond!r}")
        return cond.to(device)

    def forward(self, cond: Tensor, drop: Tensor | None = None) -> Condition:
        """cond: (B,) labels; drop: (B,) bool, True = null condition. Returns Condition."""
        self._check(cond)
        null = cond == NULL_CLASS if drop is None else drop | (cond == NULL_CLASS)
        if self.learned_null:
            return Condition(self.embedding(cond.masked_fill(null, self.num_classes)))
        start = self.embedding(cond.clamp_min(0))
        return Condition(start.masked_fill(null[:, None], 0.0))

    def null_like(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, NULL_CLASS)

    def _check(self, cond: Tensor) -> None:
        if cond.ndim != 1 or cond.is_floating_point():
            raise ValueError(f"class labels must be (B,) integers, got {cond.dtype} {cond.shape}")
        low, high = cond.aminmax()
        if low < NULL_CLASS or high >= self.num_classes:
            raise ValueError(
                f"class labels span [{low}, {high}], expected [0, {self.num_classes - 1}] or "
                f"{NULL_CLASS} for no class"
            )


CONDITIONERS = {"none": NoConditioner, "class": ClassConditioner}
