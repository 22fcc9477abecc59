"""Callbacks at work during the steps: the progress bar, how much of a codebook is used, and steps
whose loss or gradient is not finite."""

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from flextok.draws import REVIVE, derived_generator
from flextok.files import write_text
from flextok.quantizers import VQ
from flextok.quantizers.vq import codebook_usage, count_codes
from flextok.schema import ConfigError
from flextok.training.module import TrainingModule

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

    def __init__(self, quantizer: torch.nn.Module, every: int, revive: bool = False, seed: int = 0):
        if revive and not isinstance(quantizer, VQ):
            raise ConfigError(f"trainer.revive_every={every} needs a learned codebook (vq)")
        self.quantizer: Any = quantizer
        self.every, self.revive, self.seed = every, revive, seed
        self.counts: Tensor | None = None  # of the codes in whole steps since the last log
        self.pending: Tensor | None = None  # in the step at work
        self.validation_counts: Tensor | None = None
        self.counting = True  # whether the batch of validation counts
        self.step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.hook = self.quantizer.register_forward_hook(self.count)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.hook.remove()

    def count(self, quantizer: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        finite = inputs[0].isfinite().all(dim=-1)  # a step that is not is skipped and reported
        counts = count_codes(output[1].where(finite, -1), quantizer.codebook_size)
        if quantizer.training:
            self.pending = counts if self.pending is None else self.pending + counts
            self.z = inputs[0].detach()
        elif self.validation_counts is not None and self.counting:
            self.validation_counts += counts

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
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
            # every process moves the codes alike; a tensor is sent pickled, device and all
            z = trainer.strategy.broadcast(self.z.cpu()).to(self.z.device)
            revived = self.quantizer.revive(z, counts, generator=draws)
            pl_module.log("train/codes_revived", float(revived))
        self.counts = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        size = self.quantizer.codebook_size
        self.validation_counts = torch.zeros(size, dtype=torch.long, device=pl_module.device)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *args: Any
    ) -> None:
        self.counting = batch["count"] > 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: TrainingModule) -> None:  # type: ignore[override]
        assert self.validation_counts is not None, "validation has started"
        counts = trainer.strategy.reduce(self.validation_counts, reduce_op="sum")
        used, perplexity = self.log_usage(pl_module, "val", counts)
        self.validation_counts = None
        size = self.quantizer.codebook_size
        text = f"{used:.1%} of {size} codes in use, perplexity {perplexity:.0f}"
        pl_module.objective.model.metadata["codebook"] = text
        log.info("step %d: codebook: %s, over the validation set", trainer.global_step, text)

    def log_usage(
        self, pl_module: L.LightningModule, stage: str, counts: Tensor
    ) -> tuple[float, float]:
        used, perplexity = (float(value) for value in codebook_usage(counts))
        pl_module.log(f"{stage}/codes_used", used)
        pl_module.log(f"{stage}/perplexity", perplexity)
        return used, perplexity

    def state_dict(self) -> dict[str, Any]:
        """The counts of all processes, which save together."""
        counts = self.counts
        if counts is not None and distributed.is_initialized():
            counts = counts.clone()
            distributed.all_reduce(counts)
        return {"counts": counts, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.step = state_dict["counts"], state_dict["step"]
        if self.counts is not None and distributed.is_initialized() and distributed.get_rank():
            self.counts = torch.zeros_like(self.counts)  # the first process has them


class NonFiniteLoss(ValueError):
    """The run cannot go on; the message names the step, the report and the remedy."""


class SkipNonFinite(L.Callback):
    """Takes the gradients of such a step away before the optimizer sees them. Data and schedule
    move on. Gradients are shared between processes, so all of them decide alike."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.skipped = 0
        self.in_a_row = 0
        self.losses: list[Tensor] = []  # of this process, the latest

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        scaler = trainer.scaler  # of fp16, which has multiplied the loss
        unscaled = loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))
        self.losses = [*self.losses[-19:], unscaled.detach().clone()]
        # an infinite loss may have finite gradients: make them NaN, here and so everywhere
        loss.mul_(torch.where(loss.detach().isfinite(), 1.0, torch.nan))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm.isfinite():
            self.in_a_row = 0
            pl_module.log("train/grad_norm", norm)
        else:
            self.skipped += 1
            self.in_a_row += 1
            for parameter in parameters:
                parameter.grad = None
        pl_module.log("train/skipped_steps", float(self.skipped))
        if self.in_a_row >= self.limit:
            self.give_up(trainer, optimizer)

    def give_up(self, trainer: L.Trainer, optimizer: Any) -> None:
        step = trainer.global_step
        report = {
            "step": step,
            "steps_in_a_row": self.in_a_row,
            "steps_skipped": self.skipped,
            "rank": trainer.global_rank,
            "last_losses": [float(loss) for loss in self.losses],
            "learning_rates": [group["lr"] for group in optimizer.param_groups],
            "precision": str(trainer.precision),
        }
        path = self.folder / f"nonfinite-step-{step:07d}-rank-{trainer.global_rank}.json"
        # NaN is no JSON: as words
        text = json.dumps(json.loads(json.dumps(report), parse_constant=str), indent=2) + "\n"
        write_text(path, text)
        raise NonFiniteLoss(
            f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to "
            f"step {step}; the weights were left as before. Report: {path}. Lower optim.lr or "
            "optim.grad_clip, choose trainer.precision=32-true or look at the data, then start "
            "again: the run continues from its last checkpoint"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
