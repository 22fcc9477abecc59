"""Nested dropout (arXiv 1402.0915; FlexTok, section 3.1): how many ordered registers to keep.

Each sampler maps uniform draws u in [0, 1) to keep in [1, num_registers].
"""

import torch
from torch import Tensor


def uniform(u: Tensor, num_registers: int) -> Tensor:
    """u: (B,) in [0, 1). Returns keep (B,) long, uniform over 1..K."""
    return (u * num_registers).long().clamp(max=num_registers - 1) + 1


def pow2(u: Tensor, num_registers: int) -> Tensor:
    """Uniform over 1, 2, 4, ..., K (K itself counts when it is no power of two): the released
    FlexTok models' choice."""
    sizes = powers_of_two(num_registers).to(u.device)
    return sizes[uniform(u, len(sizes)) - 1]


def uniform_pow2(u: Tensor, num_registers: int) -> Tensor:
    """Uniform over 1..K, rounded up to the next power of two: P(K) = 1/2, P(K/2) = 1/4, ..."""
    keep = uniform(u, num_registers)
    sizes = powers_of_two(num_registers).to(u.device)
    return sizes[torch.searchsorted(sizes, keep)]


def none(u: Tensor, num_registers: int) -> Tensor:
    """Always all registers: no nested dropout."""
    return torch.full_like(u, num_registers, dtype=torch.long)


def powers_of_two(limit: int) -> Tensor:
    """1, 2, 4, ... below limit, then limit."""
    return torch.tensor([*(2**i for i in range((limit - 1).bit_length())), limit])


NESTED_DROPOUT = {"uniform": uniform, "pow2": pow2, "uniform_pow2": uniform_pow2, "none": none}
