"""Nested dropout (arXiv 1402.0915; FlexTok, section 3.1): how many ordered registers to keep.

Each sampler maps a number u in [0, 1), uniform in training, to a length in [1, num_registers]. The
lengths are Python numbers: they are shapes, so they are known without waiting for a device.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flextok.draws import BatchDraws
from flextok.nn.devices import to_device
from flextok.schema import ConfigError, Size, build
from flextok.tokenizers import Tokenizer
from flextok.tokenizers.base import prefix_lengths


def uniform(u: float, num_registers: int) -> int:
    """Uniform over 1..K."""
    return min(int(u * num_registers), num_registers - 1) + 1


def pow2(u: float, num_registers: int) -> int:
    """Uniform over 1, 2, 4, ..., K (K itself counts when it is no power of two): the released
    FlexTok models' choice."""
    sizes = prefix_lengths(num_registers)
    return sizes[uniform(u, len(sizes)) - 1]


def uniform_pow2(u: float, num_registers: int) -> int:
    """Uniform over 1..K, rounded up to the next power of two: P(K) = 1/2, P(K/2) = 1/4, ..."""
    sizes = prefix_lengths(num_registers)
    return sizes[bisect_left(sizes, uniform(u, num_registers))]


def sqrt_pow2(u: float, num_registers: int) -> int:
    """Powers of two again, 2^i with a probability proportional to its square root: between pow2,
    which seldom trains the last tokens, and uniform_pow2, which seldom trains the first alone."""
    sizes = prefix_lengths(num_registers)
    shares = list(accumulate(size**0.5 for size in sizes))
    return sizes[min(bisect_right(shares, u * shares[-1]), len(sizes) - 1)]


def none(u: float, num_registers: int) -> int:
    """Always all registers: no nested dropout."""
    return num_registers


NESTED_DROPOUT = {
    "uniform": uniform,
    "pow2": pow2,
    "uniform_pow2": uniform_pow2,
    "sqrt_pow2": sqrt_pow2,
    "none": none,
}


@dataclass
class PrefixConfig:
    """What objectives that train prefixes share."""

    # by default none where the model is not ordered, else pow2 for a FlexTok and, for others,
    # uniform (One-D-Piece's tail drop)
    nested_dropout: str | None = None
    batch_lengths: Size = 8  # how many a batch has: each runs apart, so fewer are larger


class LengthGroup(NamedTuple):
    """Rows of a training batch that keep equally many tokens."""

    rows: slice
    length: int  # the longest of the group
    keep: Tensor  # (rows,) long, of each, on the CPU


def as_one(groups: list[LengthGroup]) -> LengthGroup:
    """All rows of a batch as one group, which a decoder in eval mode tells apart by `keep`. For
    validation: sharded networks wait for all processes in each forward, and a process whose share
    has fewer rows may have fewer lengths."""
    keep = torch.cat([g.keep for g in groups])
    return LengthGroup(slice(0, len(keep)), max(g.length for g in groups), keep)


class NestedDropout:
    """Draws how many tokens each row of a training batch keeps.

    The lengths are stratified. Row j takes one of `strata` values of u at equal distances from an
    offset that the whole step shares; any few rows in sequence take distant ones. So each batch
    has short and long lengths in their shares, and processes with equally many rows, a multiple of
    `strata`, have the same work. Without strata every row has a value of its own."""

    def __init__(self, name: str, num_tokens: int, strata: int | None = None):
        self.name, self.sample = name, build(NESTED_DROPOUT, name, "nested dropout")
        self.num_tokens = num_tokens
        self.places = None
        if strata is not None:
            order = sorted(range(strata), key=radical_inverse)
            self.places = [order.index(j) / strata for j in range(strata)]

    @classmethod
    def of(
        cls, model: Tokenizer, config: PrefixConfig, default: str, stratified: bool = True
    ) -> "NestedDropout":
        """default: the sampler of an ordered model where config names none. Raises ConfigError for
        prefixes of a model that is not ordered."""
        name = config.nested_dropout or (default if model.ordered else "none")
        if name != "none" and not model.ordered:
            raise ConfigError(
                f"nested_dropout={name} trains prefixes: set model.ordered=true, or none"
            )
        return cls(name, model.num_tokens, config.batch_lengths if stratified else None)

    def is_even(self, rows: int) -> bool:
        """Whether processes with so many rows each have equally many groups at every step."""
        return self.places is None or self.name == "none" or rows % len(self.places) == 0

    def lengths(self, draws: BatchDraws) -> list[int]:
        """A length for each row."""
        offset, places = draws.of_step().random(), self.places
        strata = (places[j % len(places)] if places else radical_inverse(j) for j in draws.rows)
        return [self.sample((offset + u) % 1.0, num_registers=self.num_tokens) for u in strata]

    def groups(self, draws: BatchDraws) -> tuple[list[int], list[LengthGroup]]:
        """The order of the rows that puts the shorter first, and their groups in this order: one
        for each length, or all rows in one where there are no strata."""
        lengths = self.lengths(draws)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        keep = torch.tensor([lengths[i] for i in order], device="cpu")
        if self.places is None:
            return order, [LengthGroup(slice(0, len(order)), self.num_tokens, keep)]
        groups, start = [], 0
        for length, count in sorted(Counter(lengths).items()):
            rows = slice(start, start + count)
            groups.append(LengthGroup(rows, length, keep[rows]))
            start += count
        return order, groups


def radical_inverse(j: int) -> float:
    """The bits of j behind the point, in reverse (van der Corput): 0, 1/2, 1/4, 3/4, 1/8, ..."""
    return int(f"{j:b}"[::-1], 2) / 2 ** len(f"{j:b}") if j else 0.0


def take_rows(x: Tensor, order: list[int]) -> Tensor:
    """The rows of x at these places, without waiting for x's device."""
    return x[to_device(torch.tensor(order, device="cpu"), x.device)]
