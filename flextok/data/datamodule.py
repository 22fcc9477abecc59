"""Lightning's view of the data: training streams that resume exactly, and a validation pass."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from flextok.data.shard_stream import Layout, ShardStream
from flextok.data.stream import EvaluationSet, Item, PositionSampler, Stream, collate
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetStream


def prepare_image(transform: ImageTransform) -> Callable[[Item, torch.Generator | None], Item]:
    def prepare(item: Item, generator: torch.Generator | None) -> Item:
        return {"image": transform(item["image"], generator), "label": item["label"]}

    return prepare


def prepare_tokens(item: Item, generator: torch.Generator | None) -> Item:
    return item


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
    ):
        super().__init__()
        streams = isinstance(train, WebDatasetStream)
        self.stream = (ShardStream if streams else Stream)(train, prepare, seed)
        self.evaluation = EvaluationSet(validation, prepare) if validation is not None else None
        self.batch_size, self.num_workers = batch_size, num_workers

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None, "the data module is driven by a Trainer"
        # batches already consumed: with a resumed run Lightning restores global_step before this
        start = trainer.global_step * trainer.accumulate_grad_batches
        if isinstance(self.stream, ShardStream):
            workers = max(1, self.num_workers)
            self.stream.lay_out(Layout(self.batch_size, trainer.world_size, workers))
        sampler = PositionSampler(self.batch_size, start, trainer.global_rank, trainer.world_size)
        return DataLoader(self.stream, batch_sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader | list:
        if self.evaluation is None:
            return []
        trainer = self.trainer
        assert trainer is not None, "the data module is driven by a Trainer"
        mine = range(trainer.global_rank, len(self.evaluation), trainer.world_size)
        return DataLoader(
            self.evaluation, batch_size=self.batch_size, sampler=mine, **self._loader_options()
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
