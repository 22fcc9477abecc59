"""Callbacks: picture grids, and the export of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from flextok import viz
from flextok.pipeline import decode_prefixes, generate_images, prefix_lengths
from flextok.training.sharding import gather, is_sharded


class Pictures(L.Callback):
    """After each validation, writes a grid drawn by `draw` to <folder>/step-<n>.png and to
    TensorBoard. Listed before the averaging callback, so that it sees the averaged weights."""

    def __init__(self, folder: Path, draw: Callable[[Any], Any]):
        self.folder, self.draw = folder, draw

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # of a sharded model no process can draw alone
        if trainer.sanity_checking or not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        with torch.no_grad():
            picture = self.draw(pl_module.model)
        if not trainer.is_global_zero:
            return
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


class Export(L.Callback):
    """Writes the model, as from_pretrained reads it, after each validation. Listed before the
    averaging callback, so that it sees the averaged weights."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            export(pl_module.model, self.folder, trainer.global_step, trainer.is_global_zero)


def export(model: Any, folder: Path, step: int, write: bool = True) -> None:
    """Save a model, a sharded one too: then every process must call this, and one of them write."""
    state = gather(model.state_dict(), keep=write) if is_sharded(model) else None
    if write:
        model.metadata["step"] = step
        model.save_pretrained(folder, state)
