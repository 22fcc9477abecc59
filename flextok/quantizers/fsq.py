"""Finite scalar quantization (arXiv 2309.15505), section 3: bound, round, straight-through.

Codes are normalised to about [-1, 1] (integer level / (L // 2)); an index is mixed-radix over the
levels, first dimension fastest. fp32 throughout: rounding decides an index.
"""

import math

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """Rounds each of C dimensions to its own number of levels: prod(levels) codes, no codebook.

    gain: of z, before tanh. 0.8 is iFSQ (arXiv 2601.17124), whose bound 2 sigmoid(1.6 z) - 1 is
    tanh(0.8 z) and makes a standard normal z nearly uniform. Rounding then gives each outer level
    half an inner one's share; full_ends: a whole one, without which 0.8 uses the levels less evenly
    than 1 does. Neither changes what an index means."""

    def __init__(
        self, levels: list[int], eps: float = 1e-3, gain: float = 1.0, full_ends: bool = False
    ):
        super().__init__()
        if not levels or any(not isinstance(n, int) or n < 2 for n in levels):
            raise ValueError(f"levels={levels} must be a non-empty list of integers >= 2")
        if gain <= 0:
            raise ValueError(f"gain={gain} must be positive (1 = FSQ, 0.8 = iFSQ)")
        self.levels, self.eps, self.gain, self.full_ends = list(levels), eps, gain, full_ends
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        level = torch.tensor(self.levels, device=like.device)
        basis = torch.tensor(
            [math.prod(self.levels[:i]) for i in range(self.dim)], device=like.device
        )
        return level, basis

    def bound(self, z: Tensor) -> Tensor:
        """z: (..., C). Returns z squashed so that rounding gives exactly L values a dimension."""
        level, _ = self._constants(z)
        half = (level - 1) * (1 + self.eps) / 2
        if self.full_ends:
            half = level * (1 - self.eps) / 2
        offset = torch.where(level % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / half)
        return torch.tanh(self.gain * z + shift) * half - offset

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z: (B, K, C) float. Returns codes (B, K, C) in about [-1, 1], indices (B, K) long, and an
        auxiliary loss of zero. Gradients pass straight through the rounding."""
        if z.shape[-1] != self.dim:
            raise ValueError(f"z has {z.shape[-1]} channels; FSQ has {self.dim} levels")
        level, basis = self._constants(z)
        bounded = self.bound(z.float())  # fp32 island
        rounded = bounded.detach().round()
        straight_through = rounded + (bounded - bounded.detach())  # the value is exactly `rounded`
        codes = straight_through / (level // 2)
        indices = ((rounded.long() + level // 2) * basis).sum(dim=-1)
        return codes, indices, codes.new_zeros(())

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """indices: (...) long in [0, codebook_size). Returns codes (..., C) float32."""
        level, basis = self._constants(indices)
        return (indices[..., None] // basis % level - level // 2) / (level // 2).float()
