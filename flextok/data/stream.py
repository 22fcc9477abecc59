"""Endless shuffled training data, addressed by position.

Sample p of the stream is a pure function of (dataset, seed, p): its epoch's order and its
augmentation draws are derived, never carried along. So an interrupted run continues with exactly
the batches that it would have seen, with any number of processes and workers.
"""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import RawArray, Value
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, default_collate

from flextok.data.pictures import CorruptPicture
from flextok.draws import AUGMENT, BLOCK, ORDER, derived_generator
from flextok.generators.text import Text

log = logging.getLogger(__name__)
Item = Mapping[str, Any]


class SkipCounter:
    """Counts unreadable samples over all worker processes and epochs and names each once in a
    warning."""

    size = 4096  # how many are known again

    def __init__(self) -> None:
        self.count = Value("q", 0)
        self.known = RawArray("q", self.size + 1)  # how many, and a hash of each message

    def skip(self, error: CorruptPicture) -> None:
        digest = hashlib.blake2b(str(error).encode("utf-8", "replace"), digest_size=7)
        key = int.from_bytes(digest.digest(), "big")
        with self.count.get_lock():
            known = self.known[0]
            if key in self.known[1 : known + 1]:
                return
            if known < self.size:
                self.known[0], self.known[known + 1] = known + 1, key
            self.count.value += error.samples
            count = self.count.value
        what = (
            f"{error.samples} unreadable samples" if error.samples > 1 else "an unreadable sample"
        )
        log.warning("skipped %s (%d so far): %s", what, count, error)


_counters: WeakKeyDictionary[Dataset, SkipCounter] = WeakKeyDictionary()


def counter_of(dataset: Any) -> SkipCounter:
    """The counter of a data set, one for all that read from it."""
    if not isinstance(dataset, Dataset):
        return SkipCounter()
    return _counters.setdefault(dataset, SkipCounter())


class Sharded(Dataset[dict[str, Any]]):
    """A data set in shards, whose samples are quick to read once their shard is at hand."""

    counts: Sequence[int]  # samples of each shard
    shuffle: int  # so many samples of the shards in a row are shuffled at a time

    def __len__(self) -> int:
        return sum(self.counts)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Have these shards at hand soon, without waiting for them."""


class Buckets(NamedTuple):
    """The shape that each sample's image is brought to, see data/buckets.py."""

    shapes: list[tuple[int, int]]  # (H, W)
    numbers: np.ndarray  # (samples,) which of the shapes


class Stream(Dataset):
    """Maps a position p >= 0 to an augmented sample.

    An epoch has every sample once: those of a data set in a new order; of a Sharded one, the shards
    in a new order and, in a row of their samples, blocks of `shuffle`, each in an order of its own.
    An unreadable sample is skipped with a counted warning: one of those that the epoch has 1, 3, 7,
    15... positions later stands in, so that no sample stands in for the whole of a lost shard.

    With buckets, a sample is made to the shape of its bucket, and so is what stands in for it.
    """

    def __init__(
        self,
        dataset: Any,
        prepare: Callable[[Item, torch.Generator | None], Item],
        seed: int = 0,
        buckets: Buckets | None = None,
    ):
        if len(dataset) == 0:
            raise ValueError("the dataset is empty: nothing to train on")
        self.dataset, self.prepare, self.seed = dataset, prepare, seed
        self.block_size = dataset.shuffle if isinstance(dataset, Sharded) else len(dataset)
        self.skips, self.buckets = counter_of(dataset), buckets
        self._block: tuple[tuple[int, int], np.ndarray] | None = None
        self._batches: tuple[tuple[int, int], np.ndarray] | None = None

    def index_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        number, place = divmod(offset, self.block_size)
        if self._block is None or self._block[0] != (epoch, number):
            self._block = ((epoch, number), self._indices(epoch, number))
        return int(self._block[1][place])

    def _indices(self, epoch: int, number: int) -> np.ndarray:
        """The indices of a block's samples, in order."""
        order = derived_generator(self.seed, ORDER, epoch)
        if not isinstance(self.dataset, Sharded):
            return torch.randperm(len(self.dataset), generator=order).numpy()
        counts = np.asarray(self.dataset.counts)
        shards = torch.randperm(len(counts), generator=order).numpy()
        ends = np.cumsum(counts[shards])
        first = number * self.block_size
        rows = np.arange(first, min(first + self.block_size, len(self.dataset)))
        turns = np.searchsorted(ends, rows, side="right")
        following = np.searchsorted(ends, rows[-1] + self.block_size, side="right")
        self.dataset.prefetch(shards[turns[0] : following + 1].tolist())
        indices = rows + (np.cumsum(counts)[shards] - ends)[turns]
        draws = derived_generator(self.seed, BLOCK, epoch, number)
        return indices[torch.randperm(len(rows), generator=draws).numpy()]

    def batch(self, number: int, size: int, start: int = 0) -> list[int]:
        """The positions of a batch of `size` samples, the `number`th after `start` samples: those
        in sequence or, with buckets, some of an epoch's that share a shape, in the epoch's order.
        The last batch of each bucket is filled up with samples that the epoch has had."""
        if self.buckets is None:
            first = start + number * size
            return list(range(first, first + size))
        length, counts = len(self.dataset), np.bincount(self.buckets.numbers)
        epoch, place = divmod(start // size + number, self._batches_an_epoch(size))
        if self._batches is None or self._batches[0] != (epoch, size):
            numbers = self.buckets.numbers[self._indices(epoch, 0)]
            places = [np.flatnonzero(numbers == bucket) for bucket in range(len(counts))]
            whole = [np.resize(some, (-(-len(some) // size), size)) for some in places]
            batches = np.concatenate(whole)
            self._batches = (epoch, size), batches[np.argsort(batches[:, 0])]
        return (epoch * length + self._batches[1][place]).tolist()

    def _batches_an_epoch(self, size: int) -> int:
        assert self.buckets is not None, "without buckets an epoch may end within a batch"
        return int((-(-np.bincount(self.buckets.numbers) // size)).sum())

    def resized(self, samples: int, before: int, size: int) -> int:
        """After how many samples batches of `size` go on, when there were `samples` in batches of
        `before`. With buckets an epoch's batches are others: they go on where the same share of
        them is behind, so that some samples near there may come again or be left out."""
        if self.buckets is None or before == size:
            return samples
        epoch, place = divmod(samples // before, self._batches_an_epoch(before))
        count = self._batches_an_epoch(size)
        return (epoch * count + place * count // self._batches_an_epoch(before)) * size

    def __getitem__(self, position: int) -> Item:
        size, shape = len(self.dataset), None
        if self.buckets is not None:
            shape = self.buckets.shapes[self.buckets.numbers[self.index_at(position)]]
        begin = position - position % size
        jumps = (2**k - 1 for k in range(size.bit_length()))
        for later in itertools.chain(jumps, range(size)):
            index = self.index_at(begin + (position + later) % size)
            generator = derived_generator(self.seed, AUGMENT, position)
            try:
                item = self.dataset[index]
                return self.prepare(item if shape is None else {**item, "size": shape}, generator)
            except CorruptPicture as error:
                self.skips.skip(error)
        raise ValueError(f"none of the {size} samples can be read; see the warnings above")


def as_it_is(item: Item, generator: torch.Generator | None) -> Item:
    """Prepares nothing: for items that are ready."""
    return item


class EvaluationSet(Dataset):
    """Every sample once, in order, without augmentation; unreadable ones are None (see collate)."""

    def __init__(self, dataset: Any, prepare: Callable[[Item, torch.Generator | None], Item]):
        self.dataset, self.prepare = dataset, prepare
        self.skips = counter_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item | None:
        try:
            return self.prepare(self.dataset[index], None)
        except CorruptPicture as error:
            self.skips.skip(error)
            return None


class PositionSampler(Sampler[list[int]]):
    """Endless batches of a stream's positions for one process, after `start` samples of all."""

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.stream, self.batch_size, self.start = stream, batch_size, start
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.count(self.rank, self.world_size):
            yield self.stream.batch(number, self.batch_size, self.start)


def collate(items: Sequence[Item | None]) -> Any:
    """Stacks items to a batch, leaving out None; {} if nothing is left. "text" becomes a Text."""
    kept = [item for item in items if item is not None]
    if not kept:
        return {}
    if "text" not in kept[0]:
        return default_collate(kept)
    batch = default_collate([{k: v for k, v in item.items() if k != "text"} for item in kept])
    return {**batch, "text": Text.pad([item["text"] for item in kept])}
