"""Callbacks: picture grids, and the export of the model."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor

from flextok import viz
from flextok.draws import REVIVE, derived_generator
from flextok.generators.text import Text
from flextok.pipeline import decodable_lengths, generate_images, reconstruct_prefixes
from flextok.quantizers.vq import codebook_usage, count_codes
from flextok.schema import NotFinite
from flextok.training.sharding import gather, is_sharded

log = logging.getLogger(__name__)


class Progress(TQDMProgressBar):
    """A bar of the optimizer steps, of all that the run has; a continued run's begins where it
    continues, so that its rate and remaining time are those of the steps taken now."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        bar = self.train_progress_bar
        bar.reset(total=trainer.max_steps)
        bar.initial = bar.n = bar.last_print_n = trainer.global_step

    def on_train_epoch_start(self, *args: Any) -> None:
        pass  # there is one endless epoch

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if step > bar.n and self._should_update(step, trainer.max_steps):
            bar.update(step - bar.n)
            bar.set_postfix(self.get_metrics(trainer, pl_module))


class CodebookUsage(L.Callback):
    """Logs how much of the tokenizer's codebook is in use: the fraction of codes chosen at all and
    the perplexity, in training over the last `every` steps and over each validation.

    revive: also moves codes that those steps never chose onto encoder outputs of the last one.
    """

    def __init__(self, every: int, revive: bool = False, seed: int = 0):
        self.every, self.revive, self.seed = every, revive, seed
        self.counts: Tensor | None = None  # of the codes in whole steps since the last log
        self.pending: Tensor | None = None  # in the step at work
        self.validation_counts: Tensor | None = None
        self.counting = True  # whether the batch of validation counts
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.hook = pl_module.model.quantizer.register_forward_hook(self.count)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.hook.remove()

    def count(self, quantizer: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        finite = inputs[0].isfinite().all(dim=-1)  # a step that is not is skipped and reported
        counts = count_codes(output[1].where(finite, -1), quantizer.codebook_size)
        if quantizer.training:
            self.pending = counts if self.pending is None else self.pending + counts
            self.z = inputs[0].detach()
        elif self.validation_counts is not None and self.counting:
            self.validation_counts += counts

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step or self.pending is None:
            return  # gradients are being accumulated
        self.step = trainer.global_step
        if self.counts is not None:
            self.pending += self.counts.to(self.pending.device)
        self.counts, self.pending = self.pending, None
        if self.step % self.every:
            return
        counts = trainer.strategy.reduce(self.counts, reduce_op="sum")
        self.log_usage(pl_module, "train", counts)
        if self.revive:
            draws = derived_generator(self.seed, REVIVE, self.step)
            z = trainer.strategy.broadcast(self.z)  # every process moves the codes alike
            revived = pl_module.model.quantizer.revive(z, counts, generator=draws)
            pl_module.log("train/codes_revived", float(revived))
        self.counts = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.validation_counts = torch.zeros(
            pl_module.model.vocab_size, dtype=torch.long, device=pl_module.device
        )

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, *args: Any
    ) -> None:
        self.counting = batch["count"] > 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        counts = trainer.strategy.reduce(self.validation_counts, reduce_op="sum")
        used, perplexity = self.log_usage(pl_module, "val", counts)
        self.validation_counts = None
        size = pl_module.model.vocab_size
        text = f"{used:.1%} of {size} codes in use, perplexity {perplexity:.0f}"
        pl_module.model.metadata["codebook"] = text
        log.info("step %d: codebook: %s, over the validation set", trainer.global_step, text)

    def log_usage(self, pl_module: Any, stage: str, counts: Tensor) -> tuple[float, float]:
        used, perplexity = (float(value) for value in codebook_usage(counts))
        pl_module.log(f"{stage}/codes_used", used)
        pl_module.log(f"{stage}/perplexity", perplexity)
        return used, perplexity

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.step = state_dict["counts"], state_dict["step"]


class Pictures(L.Callback):
    """After each validation, writes a grid drawn by `draw` to <folder>/step-<n>.png and to
    TensorBoard. Listed before the averaging callback, so that it sees the averaged weights."""

    def __init__(self, folder: Path, draw: Callable[[Any], Any]):
        self.folder, self.draw = folder, draw

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # of a sharded model no process can draw alone
        if trainer.sanity_checking or not (trainer.is_global_zero or is_sharded(pl_module)):
            return
        try:
            with torch.no_grad():
                picture = self.draw(pl_module.model)
        except NotFinite as error:  # no reason to end a run that may recover
            log.warning("step %d: no pictures drawn: %s", trainer.global_step, error)
            return
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
        lengths = decodable_lengths(tokenizer)
        return viz.coarse_to_fine(images, reconstruct_prefixes(tokenizer, images, lengths))

    return draw


def draw_generations(
    tokenizer: Any, cond: Tensor | Text, names: list[str] | None = None
) -> Callable[[Any], Any]:
    """cond: (n,) labels or n prompts, one picture each, decoded at 1, 2, 4, ... tokens."""

    def draw(generator: Any) -> Any:
        device = next(generator.parameters()).device
        tokenizer.to(device)
        lengths = decodable_lengths(tokenizer, generator.num_tokens)
        pictures = generate_images(generator, tokenizer, cond.to(device), lengths)
        return viz.coarse_to_fine(None, pictures, names)

    return draw


class Evaluation(L.Callback):
    """At validations, every so many steps, runs `evaluate(model, folder)` on all processes, the
    code of the command, which writes <folder>/step-<n>/report.json; its scores go to the logs as
    eval/<score>@<tokens>. Listed before the averaging callback, so that it sees the average."""

    def __init__(self, folder: Path, evaluate: Callable[[Any, Path], dict[str, Any]], every: int):
        """every: steps, a multiple of those between validations."""
        self.folder, self.evaluate, self.every = folder, evaluate, every

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.global_step % self.every:
            return
        report = self.evaluate(pl_module.model, self.folder / f"step-{trainer.global_step:07d}")
        for result in report["results"]:
            scores = {f"eval/{k}@{result['num_tokens']}": v for k, v in result["scores"].items()}
            for logger in trainer.loggers:  # these write on the first process only
                logger.log_metrics(scores, trainer.global_step)


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
