"""Steps whose loss or gradient is not finite are skipped, counted, and after too many in a row
the run stops with a report."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flextok.files import write_text


class NonFiniteLoss(ValueError):
    """The run cannot go on; the message names the step, the report and the remedy."""


class SkipNonFinite(L.Callback):
    """Takes the gradients of such a step away before the optimizer sees them. Data and schedule
    move on. Gradients are shared between processes, so all of them decide alike."""

    def __init__(self, folder: Path, limit: int):
        if limit < 1:
            raise ValueError(f"max_nonfinite={limit} must be at least 1")
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
