"""Random draws from a torch.Generator, and generators that belong to a row and never to its batch.

Whatever the package draws for image number r under a seed comes from derived_generator(seed,
purpose, r). So it does not depend on the batch size, and a CPU generator gives the same ones
whatever device the model runs on. Two images, seeds or purposes have different draws, but for
chance: PyTorch's CPU generator has 2^32 seeds, so among 100,000 images one pair is to be expected.
"""

import copy
import ctypes
import functools
import hashlib
import random
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flextok.nn.devices import to_device, widest
from flextok.schema import whole_number

Rng = torch.Generator | Sequence[torch.Generator] | None  # one for a batch, or one for each row

# what draws are for, the second number of a key: no two purposes share one
ORDER, AUGMENT, STEP, VALIDATION = 1, 2, 3, 4  # of training
NOISE, CODES, SPREAD, POSTERIOR = 5, 6, 7, 8  # of an image
REVIVE, PROBE, BLOCK = 9, 10, 11  # of a codebook, a scene probe, a block of a stream
ROW = 12  # of a training batch
SEARCH = 13  # of a candidate in a search
AGAIN = 14  # of a row that a training batch has several times


def sample_evenly(number: int, total: int) -> list[int]:
    """Ascending: of `total` items `number`, one at random of each of as many equal stretches, the
    same in each call. Every n-th would be of one class where a data set's classes take turns, and
    the first ones where it is sorted. Of fewer items each as often as the others or once more."""
    ends = torch.arange(number + 1) * total // number
    places = torch.rand(number, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (ends[:-1] + (places * ends.diff()).long()).tolist()


def derived_generator(*key: int) -> torch.Generator:
    """A torch.Generator seeded by a tuple of integers, well mixed (SplitMix64)."""
    state = 0x9E3779B97F4A7C15
    for part in map(whole, key):
        if not -(2**63) <= part < 2**64:
            raise ValueError(f"seed={part} must be a whole number of at most 64 bits")
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


def whole(part: object) -> int:
    """A whole number of any type, NumPy's or a tensor's too. Raises ValueError."""
    if (number := whole_number(part)) is None:
        raise ValueError(f"seed={part!r} must be a whole number of at most 64 bits")
    return number


def row_generators(seed: int, purpose: int, rows: Iterable[int] | Tensor) -> list[torch.Generator]:
    """One generator for each of these image numbers."""
    return [derived_generator(seed, purpose, int(row)) for row in rows]


def draw(
    sampler: Callable[..., Tensor], shape: tuple[int, ...], generator: Rng, device: torch.device
) -> Tensor:
    """torch.rand or torch.randn of shape (B, ...) on the generator's device, moved to `device`,
    of fp32 always. Of several generators, each draws its row."""
    if sampler in (torch.rand, torch.randn):
        sampler = functools.partial(sampler, dtype=torch.float32)
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} rows: give one for each")
        rows = [sampler(shape[1:], generator=one, device=one.device) for one in generator]
        return to_device(torch.stack(rows), device)
    if isinstance(generator, int):
        raise ValueError(
            f"generator={generator} must be a torch.Generator, such as "
            f"torch.Generator().manual_seed({generator})"
        )
    source = device if generator is None else generator.device
    return to_device(sampler(shape, generator=generator, device=source), device)


def uniforms(shape: tuple[int, ...], generator: Rng, device: torch.device) -> Tensor:
    """Uniform draws in [0, 1) of shape (B, ...), as precise as the device can hold."""
    return draw(functools.partial(torch.rand, dtype=widest(device)), shape, generator, device)


def uniform_steps(steps: int, batch: int, generator: Rng, device: torch.device) -> Tensor:
    """(steps, batch) uniform draws, moved to `device` at once. The first steps' draws do not depend
    on how many follow."""
    if isinstance(generator, Sequence):
        return uniforms((batch, steps), generator, device).T
    # a call for each step: on a GPU a longer call gives other numbers from the start
    rand = functools.partial(torch.rand, generator=generator, dtype=widest(device))
    source = device if generator is None else generator.device
    rows = [rand(batch, device=source) for _ in range(steps)]
    return to_device(torch.stack(rows), device)


def base_seed(generator: torch.Generator | None) -> int:
    """A seed from the state of `generator` (None = PyTorch's own), which is moved on by one draw;
    nothing is read back from its device."""
    source = torch.default_generator if generator is None else generator
    state = source.get_state()
    data = ctypes.string_at(state.data_ptr(), state.nbytes)
    torch.empty((), device=source.device).uniform_(generator=source)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class BatchDraws:
    """What training draws for a batch. All draws of a row come from a generator that the step's
    seed and the row's number decide: processes and micro-batches that share a step's batch draw
    what one process would draw for the whole of it."""

    def __init__(
        self,
        batch: int,
        generator: torch.Generator | None = None,
        rows: Sequence[int] | Tensor | None = None,
    ):
        """generator: in the same state for the whole step; None = PyTorch's own. rows: the rows'
        numbers in the step's batch, 0 .. batch-1 by default."""
        self.seed = base_seed(generator)
        numbers = range(batch) if rows is None else rows
        self.rows = numbers.tolist() if isinstance(numbers, Tensor) else [int(n) for n in numbers]
        if len(self.rows) != batch:
            raise ValueError(f"{len(self.rows)} row numbers for {batch} rows: give one for each")
        self.generators = [derived_generator(self.seed, ROW, row) for row in self.rows]

    def __call__(
        self, sampler: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device
    ) -> Tensor:
        """torch.rand, randn or the like of shape (B, *shape)."""
        return draw(sampler, (len(self.rows), *shape), self.generators, device)

    def of_step(self, purpose: str = "") -> random.Random:
        """Python's random number generator for what is drawn once for the whole step; each purpose
        has one of its own."""
        return random.Random(f"{self.seed} {purpose}" if purpose else self.seed)

    def take(self, order: Sequence[int]) -> "BatchDraws":
        """The draws of the rows at these places alone."""
        taken = copy.copy(self)
        taken.rows = [self.rows[i] for i in order]
        taken.generators = [self.generators[i] for i in order]
        return taken

    def repeat(self, times: int) -> "BatchDraws":
        """The draws of a batch that has each row so many times, one after the other."""
        again = copy.copy(self)
        again.rows = [row * times + i for row in self.rows for i in range(times)]
        again.generators = [derived_generator(self.seed, AGAIN, row) for row in again.rows]
        return again
