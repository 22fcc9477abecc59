"""Endless shuffled training data, addressed by position.

Sample p of the stream is a pure function of (dataset, seed, p): its epoch's permutation and its
augmentation draws are derived, never carried along. So an interrupted run continues with exactly
the batches that it would have seen, and any number of workers gives the same ones.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import RawArray, Value
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from flextok.data.pictures import CorruptPicture
from flextok.draws import AUGMENT, ORDER, derived_generator
from flextok.generators.text import Text

log = logging.getLogger(__name__)
Item = Mapping[str, Any]


class SkipCounter:
    """Counts unreadable samples over all worker processes and epochs and says so, naming each
    once."""

    size = 4096  # how many are known again

    def __init__(self) -> None:
        self.count = Value("q", 0)
        self.told = RawArray("q", self.size + 1)  # how many, and a hash of each message

    def skip(self, error: Exception, samples: int = 1) -> None:
        digest = hashlib.blake2b(f"{samples} {error}".encode("utf-8", "replace"), digest_size=7)
        key = int.from_bytes(digest.digest(), "big")
        with self.count.get_lock():
            known = self.told[0]
            if key in self.told[1 : known + 1]:
                return
            if known < self.size:
                self.told[0], self.told[known + 1] = known + 1, key
            self.count.value += samples
            count = self.count.value
        what = "an unreadable sample" if samples == 1 else f"{samples} unreadable samples"
        log.warning("skipped %s (%d so far): %s", what, count, error)


_counters: WeakKeyDictionary[Dataset, SkipCounter] = WeakKeyDictionary()


def counter_of(dataset: Any) -> SkipCounter:
    """The counter of a data set, one for all that read from it."""
    if not isinstance(dataset, Dataset):
        return SkipCounter()
    return _counters.setdefault(dataset, SkipCounter())


class Stream(Dataset):
    """Maps a position p >= 0 to an augmented sample. An unreadable sample is skipped with a counted
    warning: the next one in dataset order stands in."""

    def __init__(
        self,
        dataset: Any,
        prepare: Callable[[Item, torch.Generator | None], Item],
        seed: int = 0,
        shuffle: bool = True,
    ):
        if len(dataset) == 0:
            raise ValueError("the dataset is empty: nothing to train on")
        self.dataset, self.prepare, self.seed, self.shuffle = dataset, prepare, seed, shuffle
        self.skips = counter_of(dataset)
        self._order: tuple[int, Tensor] | None = None

    def index_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        if not self.shuffle:
            return offset
        if self._order is None or self._order[0] != epoch:
            generator = derived_generator(self.seed, ORDER, epoch)
            self._order = (epoch, torch.randperm(len(self.dataset), generator=generator))
        return int(self._order[1][offset])

    def __getitem__(self, position: int) -> Item:
        size = len(self.dataset)
        first = self.index_at(position)
        for attempt in range(size):
            generator = derived_generator(self.seed, AUGMENT, position)
            try:
                return self.prepare(self.dataset[(first + attempt) % size], generator)
            except CorruptPicture as error:
                self.skips.skip(error)
        raise ValueError(f"none of the {size} samples can be read; see the warnings above")


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
    """Endless batches of stream positions for one process, from `start` batches on."""

    def __init__(self, batch_size: int, start: int = 0, rank: int = 0, world_size: int = 1):
        self.batch_size, self.start, self.rank, self.world_size = (
            batch_size,
            start,
            rank,
            world_size,
        )

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start
        while True:
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            batch += 1


def collate(items: Sequence[Item | None]) -> Any:
    """Stacks items to a batch, leaving out None; {} if nothing is left. "text" becomes a Text."""
    kept = [item for item in items if item is not None]
    if not kept:
        return {}
    if "text" not in kept[0]:
        return default_collate(kept)
    batch = default_collate([{k: v for k, v in item.items() if k != "text"} for item in kept])
    return {**batch, "text": Text.pad([item["text"] for item in kept])}
