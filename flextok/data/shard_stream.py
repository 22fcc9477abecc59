"""Endless training data from shards that can only be read from their beginning to their end.

As in Stream, sample p is a pure function of (dataset, seed, p, layout), so a run continues exactly
where it was. The layout is (batch size, processes, workers): each worker of each process is a lane.
An epoch puts the shards in a new order, one after the other, and cuts that row of samples into as
many equal spans as there are lanes: no lane starves, however few the shards, and all lanes' epochs
end at once. A lane reads its span in blocks of dataset.shuffle samples and shuffles each.

An epoch has every sample once, but for a remainder smaller than the number of lanes. A run that is
continued with another layout goes on after as many samples, but its spans are others: until that
epoch ends, it may see again at most as many samples as it has seen of it; after that all is as
before.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from flextok.data.pictures import CorruptPicture
from flextok.data.shards import Raw
from flextok.data.stream import Item, Stream
from flextok.data.web import Cursor, WebDatasetStream
from flextok.draws import AUGMENT, BLOCK, ORDER, derived_generator

Block = list[Raw | CorruptPicture]


class Layout(NamedTuple):
    batch_size: int
    world_size: int = 1
    workers: int = 1  # of each process

    @property
    def lanes(self) -> int:
        return self.world_size * self.workers


class Place(NamedTuple):
    lane: int
    epoch: int
    offset: int  # in the lane's span of that epoch


class ShardStream(Stream):
    """Maps a position p >= 0 to an augmented sample. Quick where each lane's positions are asked
    for in order, in one process, as a DataLoader with a PositionSampler does. A sample that cannot
    be read is skipped with a counted warning: another of its block, or of a later one, stands
    in."""

    dataset: WebDatasetStream

    def __init__(
        self,
        dataset: WebDatasetStream,
        prepare: Callable[[Item, torch.Generator | None], Item],
        seed: int = 0,
    ):
        super().__init__(dataset, prepare, seed)
        self.lay_out(Layout(batch_size=1))

    def lay_out(self, layout: Layout) -> None:
        self.layout = layout
        self.span = len(self.dataset) // layout.lanes
        if not self.span:
            raise ValueError(
                f"{len(self.dataset)} samples are too few for {layout.world_size} processes with "
                f"{layout.workers} workers each: every one needs a sample an epoch"
            )
        self.num_blocks = -(-self.span // self.dataset.shuffle)  # of a span
        # lane -> (epoch, block) that it is in, how many it had to go on from there, and the block
        self.blocks: dict[int, tuple[tuple[int, int], int, Block]] = {}
        self.cursors: dict[int, Cursor] = {}
        self._shards: tuple[int, np.ndarray, np.ndarray] | None = None

    def place(self, position: int) -> Place:
        batch_size, world_size, workers = self.layout
        batch, row = divmod(position, batch_size)
        batch, rank = divmod(batch, world_size)  # the process's batches
        turn, worker = divmod(batch, workers)  # a DataLoader asks its workers in turn
        epoch, offset = divmod(turn * batch_size + row, self.span)
        return Place(rank * workers + worker, epoch, offset)

    def __getitem__(self, position: int) -> Item:
        lane, epoch, offset = self.place(position)
        number, first = divmod(offset, self.dataset.shuffle)
        for later in range(self.num_blocks):
            block = self.block(lane, epoch, number, later)
            for attempt in range(len(block)):
                raw = block[(first + attempt) % len(block)]
                if isinstance(raw, CorruptPicture):
                    continue  # counted when the block was read
                generator = derived_generator(self.seed, AUGMENT, position)
                try:
                    return self.prepare(self.dataset.item(raw), generator)
                except CorruptPicture as error:
                    self.skips.skip(error)
        raise ValueError(f"none of {self.span} samples can be read; see the warnings above")

    def block(self, lane: int, epoch: int, number: int, later: int) -> Block:
        """Block `number` of a lane's span, shuffled. Where nothing of it can be read, the one
        `later` behind it stands in from then on."""
        held = self.blocks.get(lane)
        if held is None or held[0] != (epoch, number) or held[1] < later:
            taken = (number + later) % self.num_blocks
            block = self.read_block(lane, epoch, taken)
            draws = derived_generator(self.seed, BLOCK, epoch, lane, taken)
            shuffled = [block[i] for i in torch.randperm(len(block), generator=draws).tolist()]
            held = self.blocks[lane] = ((epoch, number), later, shuffled)
        return held[2]

    def read_block(self, lane: int, epoch: int, number: int) -> Block:
        order, ends = self.shard_order(epoch)
        size = self.dataset.shuffle
        first = lane * self.span + number * size
        last = min(first + size, (lane + 1) * self.span)
        cursor = self.cursors.setdefault(lane, Cursor())
        block: Block = []
        while first < last:
            turn = int(np.searchsorted(ends, first, side="right"))
            shard = int(order[turn])
            begin = int(ends[turn]) - self.dataset.counts[shard]
            stop = min(last, int(ends[turn]))
            found = self.dataset.read(shard, first - begin, stop - begin, cursor)
            missing = [raw for raw in found if isinstance(raw, CorruptPicture)]
            if missing:
                self.skips.skip(missing[0], len(missing))
            block += found
            first = stop
        return block

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of the shards, and where each ends in the row of samples."""
        if self._shards is None or self._shards[0] != epoch:
            draws = derived_generator(self.seed, ORDER, epoch)
            order = torch.randperm(len(self.dataset.counts), generator=draws).numpy()
            self._shards = (epoch, order, np.cumsum(np.asarray(self.dataset.counts)[order]))
        return self._shards[1:]
