"""Nested dropout (arXiv 1402.0915; FlexTok, section 3.1): how many ordered registers to keep.

Each sampler maps a number u in [0, 1), uniform in training, to a length in [1, num_registers]. The
lengths are Python numbers: they are shapes, so they are known without waiting for a device.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flextok.draws import host_random


def uniform(u: float, num_registers: int) -> int:
    """Uniform over 1..K."""
    return min(int(u * num_registers), num_registers - 1) + 1


def pow2(u: float, num_registers: int) -> int:
    """Uniform over 1, 2, 4, ..., K (K itself counts when it is no power of two): the released
    FlexTok models' choice."""
    sizes = powers_of_two(num_registers)
    return sizes[uniform(u, len(sizes)) - 1]


def uniform_pow2(u: float, num_registers: int) -> int:
    """Uniform over 1..K, rounded up to the next power of two: P(K) = 1/2, P(K/2) = 1/4, ..."""
    sizes = powers_of_two(num_registers)
    return sizes[bisect_left(sizes, uniform(u, num_registers))]


def none(u: float, num_registers: int) -> int:
    """Always all registers: no nested dropout."""
    return num_registers


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... below limit, then limit."""
    return [*(2**i for i in range((limit - 1).bit_length())), limit]


NESTED_DROPOUT = {"uniform": uniform, "pow2": pow2, "uniform_pow2": uniform_pow2, "none": none}


class LengthGroup(NamedTuple):
    """Rows of a training batch that keep equally many tokens."""

    rows: slice
    length: int  # the longest of the group
    keep: Tensor  # (rows,) long, of each, on the CPU


def draw_groups(
    sampler: Callable[..., int],
    num_registers: int,
    batch: int,
    different: int,
    generator: torch.Generator | None,
) -> list[LengthGroup]:
    """The lengths of a batch, grouped and ascending. They are stratified: `different` values of u
    (at most one a picture) lie at equal distances from one random offset, so that each batch has
    short and long ones in their shares. Generators in the same state give the same lengths to every
    process, which then all have the same work to do."""
    different = min(different, batch)
    offset = host_random(generator).random()
    strata = (j * different // batch / different for j in range(batch))
    lengths = [sampler((s + offset) % 1.0, num_registers=num_registers) for s in strata]
    groups, start = [], 0
    for length, count in sorted(Counter(lengths).items()):
        keep = torch.full((count,), length, device="cpu")
        groups.append(LengthGroup(slice(start, start + count), length, keep))
        start += count
    return groups
