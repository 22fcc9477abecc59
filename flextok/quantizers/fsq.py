"""Finite scalar quantization (arXiv 2309.15505), section 3: bound, round, straight-through.

Codes are normalised to about [-1, 1] (integer level / (L // 2)); an index is mixed-radix over the
levels, first dimension fastest. fp32 throughout: rounding decides an index.
"""

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from flextok.draws import Rng
from flextok.schema import Bounds


class FSQ(nn.Module):
    """Rounds each of C dimensions to its own number of levels: prod(levels) codes, no codebook.

    bound: how z is squashed before rounding. "tanh" is FSQ's; its outer levels are half as wide as
    the others. "ifsq" is iFSQ's (arXiv 2601.17124), 2 sigmoid(1.6 z) - 1, over L levels of equal
    width, so that a standard normal z uses them about equally often, and z = 0 lies in the middle
    of them. gain multiplies z before "tanh"; it is there for models that were saved with it. None
    of this changes what an index means."""

    def __init__(
        self,
        levels: list[int],
        eps: Annotated[float, Bounds(0, 1, open_high=True)] = 1e-3,
        bound: Literal["tanh", "ifsq"] = "tanh",
        gain: float = 1.0,
    ):
        super().__init__()
        if not levels or any(not isinstance(n, int) or n < 2 for n in levels):
            raise ValueError(f"levels={levels} must be a non-empty list of integers >= 2")
        if bound not in ("tanh", "ifsq"):
            raise ValueError(f"bound={bound!r} must be tanh or ifsq")
        if gain <= 0 or (bound == "ifsq" and gain != 1):
            raise ValueError(f"gain={gain} must be positive, and 1 with bound='ifsq'")
        if len(levels) > 32 or math.prod(levels) > 2**31:
            raise ValueError(f"levels={levels[:32]} must make at most 2^31 codes")
        self.levels, self.eps, self.gain = list(levels), eps, gain
        self.is_ifsq = bound == "ifsq"
        self.dim = len(levels)
        self.codebook_size = math.prod(levels)
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The levels and the place values of an index, copied to a device once."""
        if like.device not in self._placed:
            basis = [math.prod(self.levels[:i]) for i in range(self.dim)]
            with torch.inference_mode(False):  # they outlive a caller's inference mode
                level, places = (torch.tensor(x, device=like.device) for x in (self.levels, basis))
            self._placed[like.device] = level, places
        return self._placed[like.device]

    def bound(self, z: Tensor) -> Tensor:
        """z: (..., C). Returns z squashed so that rounding gives exactly L values a dimension."""
        level, _ = self._constants(z)
        offset = torch.where(level % 2 == 0, 0.5, 0.0)
        if self.is_ifsq:
            return torch.tanh(0.8 * z) * level * (1 - self.eps) / 2 - offset
        half = (level - 1) * (1 + self.eps) / 2
        shift = torch.atanh(offset / half)
        return torch.tanh(self.gain * z + shift) * half - offset

    def forward(self, z: Tensor, generator: Rng = None) -> tuple[Tensor, Tensor, Tensor]:
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

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """codes: (..., C) float, any values, such as the mean of two codes. Returns the indices
        (...) long of the nearest codes, dimension by dimension."""
        level, basis = self._constants(codes)
        digits = (codes.float() * (level // 2)).round().long() + level // 2
        return (torch.minimum(digits.clamp_min(0), level - 1) * basis).sum(dim=-1)
