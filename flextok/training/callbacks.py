"""Callbacks: averaged weights, picture grids, and the export of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from flextok import viz
from flextok.pipeline import decode_prefixes, generate_images, prefix_lengths


def ema(decay: float) -> WeightAveraging:
    """Exponential moving average of the weights, with the decay warmed up as
    min(decay, (1 + n) / (10 + n)) so that early weights are forgotten (TiTok's recipe). Validation,
    pictures and exports use the average."""

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        n = int(count)
        return averaged.lerp(current, 1 - min(decay, (1 + n) / (10 + n)))

    return WeightAveraging(avg_fn=average)


class Pictures(L.Callback):
    """After each validation, writes a grid drawn by `draw` to <folder>/step-<n>.png and to
    TensorBoard. Listed before the averaging callback, so that it sees the averaged weights."""

    def __init__(self, folder: Path, draw: Callable[[Any], Any]):
        self.folder, self.draw = folder, draw

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        with torch.no_grad():
            picture = self.draw(pl_module.model)
        viz.save(picture, self.folder / f"step-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, L.pytorch.loggers.TensorBoardLogger):
                pixels = torch.tensor(list(picture.tobytes()), dtype=torch.uint8)
                pixels = pixels.view(picture.height, picture.width, 3)
                logger.experiment.add_image(
                    "pictures", pixels, trainer.global_step, dataformats="HWC"
                )


def draw_reconstructions(images: Tensor) -> Callable[[Any], Any]:
    """images: (n, 3, H, W) in [-1, 1], encoded and decoded at 1, 2, 4, ... tokens."""

    def draw(tokenizer: Any) -> Any:
        indices = tokenizer.encode(images.to(next(tokenizer.parameters()).device))
        lengths = prefix_lengths(tokenizer.num_tokens)
        return viz.coarse_to_fine(images, decode_prefixes(tokenizer, indices, lengths))

    return draw


def draw_generations(tokenizer: Any, cond: Tensor) -> Callable[[Any], Any]:
    """cond: (n,) labels, one picture each, decoded at 1, 2, 4, ... tokens."""

    def draw(generator: Any) -> Any:
        device = next(generator.parameters()).device
        tokenizer.to(device)
        lengths = prefix_lengths(generator.num_tokens)
        return viz.coarse_to_fine(
            None, generate_images(generator, tokenizer, cond.to(device), lengths)
        )

    return draw


class Evaluation(L.Callback):
    """At every so many validations runs `evaluate(model, folder)` on all processes, the code of the
    command, which writes <folder>/step-<n>/report.json; its scores go to the logs as
    eval/<score>@<tokens>. Listed before the averaging callback, so that it sees the average."""

    def __init__(self, folder: Path, evaluate: Callable[[Any, Path], dict[str, Any]], every: int):
        self.folder, self.evaluate, self.every = folder, evaluate, every
        self.validations = 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every:
            return
        report = self.evaluate(pl_module.model, self.folder / f"step-{trainer.global_step:07d}")
        for result in report["results"]:
            scores = {f"eval/{k}@{result['num_tokens']}": v for k, v in result["scores"].items()}
            for logger in trainer.loggers:  # these write on the first process only
                logger.log_metrics(scores, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]


class Export(L.Callback):
    """Writes the model, as from_pretrained reads it, after each validation. Listed before the
    averaging callback, so that it sees the averaged weights."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        export(pl_module.model, self.folder, trainer.global_step)


def export(model: Any, folder: Path, step: int) -> None:
    model.metadata["step"] = step
    model.save_pretrained(folder)
