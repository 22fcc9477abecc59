"""Lightning's view of the data: training streams that resume exactly, and a validation pass."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from flextok.data.loading import make_loader
from flextok.data.pictures import CorruptPicture
from flextok.data.pixels import sample_of
from flextok.data.stream import Buckets, EvaluationSet, Item, PositionSampler, Stream, collate


class Shares(Dataset):
    """A validation set for several processes that must all run as many batches, since they wait for
    each other in each. A readable sample stands in for what cannot be read and for positions past
    the end."""

    def __init__(self, samples: EvaluationSet):
        self.samples = samples

    def __getitem__(self, position: int) -> tuple[Item, bool, int]:
        """The sample at a position, whether it counts, which a stand-in does not, and where it
        is."""
        item = self.samples[position] if position < len(self.samples) else None
        return (self.stand_in, False, position) if item is None else (item, True, position)

    @cached_property
    def stand_in(self) -> Item:
        for index in range(len(self.samples)):
            try:
                return self.samples.prepare(self.samples.dataset[index], None)
            except CorruptPicture:
                continue
        raise ValueError(f"none of the {len(self.samples)} validation samples can be read")


def collate_shares(shares: list[tuple[Item, bool, int]]) -> dict[str, Any]:
    """A batch of the samples that count, with their positions as "row" and their number as "count":
    0 where a stand-in is all that there is."""
    counted = [share for share in shares if share[1]]
    items, _, rows = zip(*(counted or shares[:1]), strict=True)
    return {**collate(list(items)), "row": list(rows), "count": len(counted)}


class DataModule(L.LightningDataModule):
    """train and validation: map-style datasets whose items `prepare` turns into tensors."""

    def __init__(
        self,
        train: Any,
        validation: Any | None,
        prepare: Callable[[Item, torch.Generator | None], Item],
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        buckets: Buckets | None = None,
    ):
        super().__init__()
        self.stream = Stream(train, prepare, seed, buckets=buckets)
        self.evaluation = EvaluationSet(validation, prepare) if validation is not None else None
        if validation is not None and len(validation) == 0:
            raise ValueError("the validation set is empty: name another, or data.validation=null")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.restored: dict[str, int] = {}  # of a checkpoint: its samples, and their batch size
        self.begun = 0, 0  # the step at which training began or went on, and the samples before it

    def state_dict(self) -> dict[str, int]:
        """The samples that the steps so far have taken: a run may go on with other processes, other
        batches and another accumulation."""
        assert self.trainer is not None, "the data module is driven by a Trainer"
        step, samples = self.begun
        samples += (self.trainer.global_step - step) * self.step_size
        return {"samples": samples, "batch_size": self.batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.restored = state_dict

    @property
    def step_size(self) -> int:
        """The samples of a step, of all processes."""
        trainer = self.trainer
        assert trainer is not None, "the data module is driven by a Trainer"
        return self.batch_size * trainer.accumulate_grad_batches * trainer.world_size

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None, "the data module is driven by a Trainer"
        # of a resumed run Lightning restores the state and global_step before this
        step = trainer.global_step
        start = step * self.step_size  # a checkpoint of an older version states no samples
        if self.restored:
            before = self.restored["samples"], self.restored["batch_size"]
            start = self.stream.resized(*before, self.batch_size)
        self.begun = step, start
        ranks = (trainer.global_rank, trainer.world_size)
        sampler = PositionSampler(self.stream, self.batch_size, start, *ranks)
        options = self._loader_options()
        return make_loader(self.stream, batch_sampler=sampler, collate_fn=collate, **options)

    def val_dataloader(self) -> DataLoader | list:
        if self.evaluation is None:
            return []
        trainer = self.trainer
        assert trainer is not None, "the data module is driven by a Trainer"
        rounds = -(-len(self.evaluation) // trainer.world_size)
        mine = range(trainer.global_rank, rounds * trainer.world_size, trainer.world_size)
        return make_loader(
            Shares(self.evaluation),
            batch_size=self.batch_size,
            sampler=mine,
            collate_fn=collate_shares,
            **self._loader_options(),
        )

    def samples(self, limit: int = 1000) -> Iterator[dict[str, Any]]:
        """Batches of at most `limit` training samples, evenly spread and without augmentation."""
        dataset, found = EvaluationSet(self.stream.dataset, self.stream.prepare), []
        for index in sample_of(self.stream.dataset, limit):
            found.append(dataset[index])
            if len(found) == self.batch_size:
                yield from filter(None, [collate(found)])
                found = []
        yield from filter(None, [collate(found)])

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
