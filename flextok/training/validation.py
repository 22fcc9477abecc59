"""What a run does after each validation, with the averaged model: image grids, evaluations, and the
export of the model."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from flextok import viz
from flextok.generators.text import Text
from flextok.hub import Pretrained
from flextok.nn.devices import to_device
from flextok.objectives import Objective
from flextok.pipeline import decodable_lengths, generate_images, reconstruct_prefixes
from flextok.schema import NotFinite
from flextok.training.module import TrainingModule
from flextok.training.sharding import gather, is_sharded, whole

log = logging.getLogger(__name__)


class AfterValidation(L.Callback):
    """Does its work with the averaged weights at the end of each validation."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        self.work(trainer, pl_module.objective)

    def work(self, trainer: L.Trainer, objective: Objective) -> None:
        raise NotImplementedError


class Images(AfterValidation):
    """Writes a grid drawn by `draw` to <folder>/step-<n>.png, TensorBoard and wandb."""

    def __init__(self, folder: Path, draw: Callable[[Any], Image.Image]):
        self.folder, self.draw = folder, draw

    def work(self, trainer: L.Trainer, objective: Objective) -> None:
        # FSDP2 notes each forward: all processes must take the same ones
        if not (trainer.is_global_zero or is_sharded(objective)):
            return
        try:
            with whole(objective), torch.no_grad():
                grid = self.draw(objective.model)
        except NotFinite as error:  # no reason to end a run that may recover
            log.warning("step %d: no images drawn: %s", trainer.global_step, error)
            return
        if not trainer.is_global_zero:
            return
        viz.save(grid, self.folder / f"step-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            step = trainer.global_step
            if isinstance(logger, L.pytorch.loggers.TensorBoardLogger):
                logger.experiment.add_image("pictures", np.asarray(grid), step, dataformats="HWC")
            elif isinstance(logger, L.pytorch.loggers.WandbLogger):
                logger.log_image("pictures", [grid], step)


class Evaluation(AfterValidation):
    """Every so many steps runs `evaluate(model, folder)` on all processes, the code of the command,
    which writes <folder>/step-<n>/report.json. Its scores go to the logs as eval/<score>@<tokens>.
    """

    def __init__(self, folder: Path, evaluate: Callable[[Any, Path], dict[str, Any]], every: int):
        """every: steps, a multiple of those between validations."""
        self.folder, self.evaluate, self.every = folder, evaluate, every

    def work(self, trainer: L.Trainer, objective: Objective) -> None:
        if trainer.global_step % self.every:
            return
        report = self.evaluate(objective.model, self.folder / f"step-{trainer.global_step:07d}")
        for result in report["results"]:
            scores = {f"eval/{k}@{result['num_tokens']}": v for k, v in result["scores"].items()}
            for logger in trainer.loggers:  # these write on the first process only
                logger.log_metrics(scores, trainer.global_step)


class Export(AfterValidation):
    """Writes the model as from_pretrained reads it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def work(self, trainer: L.Trainer, objective: Objective) -> None:
        module = trainer.lightning_module
        assert isinstance(module, TrainingModule), "fit() trains one"
        module.finish()
        export(objective.model, self.folder, trainer.global_step, trainer.is_global_zero)


def export(model: Pretrained, folder: Path, step: int, write: bool = True) -> None:
    """Save a model. If it is sharded, every process must call this and one of them write, for whom
    all wait: one that ended before could cut the others' last transfer."""
    sharded = is_sharded(model)
    state = gather(model.state_dict(), keep=write) if sharded else None
    if write:
        model.metadata["step"] = step
        model.save_pretrained(folder, state)
    if sharded:
        dist.barrier()


def draw_reconstructions(images: Tensor) -> Callable[[Any], Image.Image]:
    """images: (n, 3, H, W) in [-1, 1], encoded and decoded at 1, 2, 4, ... tokens."""

    def draw(tokenizer: Any) -> Image.Image:
        lengths = decodable_lengths(tokenizer)
        return viz.coarse_to_fine(images, reconstruct_prefixes(tokenizer, images, lengths))

    return draw


def draw_autoencoded(images: Tensor) -> Callable[[Any], Image.Image]:
    """images: (n, 3, H, W) in [-1, 1], above what an autoencoder makes of them."""

    def draw(autoencoder: Any) -> Image.Image:
        mean, _ = autoencoder.posterior(to_device(images, autoencoder.device))
        return viz.grid([images, autoencoder.decode(mean)], row_labels=["original", "decoded"])

    return draw


def draw_generations(
    tokenizer: Any, cond: Tensor | Text, names: list[str] | None = None
) -> Callable[[Any], Image.Image]:
    """cond: (n,) labels or n prompts, one image each, decoded at 1, 2, 4, ... tokens."""

    def draw(generator: Any) -> Image.Image:
        device = next(generator.parameters()).device
        tokenizer.to(device)
        lengths = decodable_lengths(tokenizer, generator.num_tokens)
        images = generate_images(generator, tokenizer, cond.to(device), lengths)
        return viz.coarse_to_fine(None, images, names)

    return draw
