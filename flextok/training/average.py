"""Exponential moving average of a model's weights, sharded as the model is."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn


class Average(nn.Module):
    """Averages of the parameters that a model trains, kept beside it in the LightningModule, so
    that checkpoints of every strategy hold them."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        for name, parameter in trained(model):
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            self.register_parameter(name.replace(".", "|"), copy)

    @torch.no_grad()
    def update(self, model: nn.Module, count: int) -> None:
        """Move by 1 - min(decay, (1 + n) / (10 + n)), n = count updates before this one, so that
        early weights are forgotten (TiTok's recipe); the first takes the weights over."""
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        current = [parameter.detach() for _, parameter in trained(model)]
        torch._foreach_lerp_(list(self.parameters()), current, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the average and the model's own weights."""
        for mine, (_, theirs) in zip(self.parameters(), trained(model), strict=True):
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From a LightningModule's state dict, that of its `model`, averaged where it says how."""
    own = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    means = {k.removeprefix("average."): v for k, v in state.items() if k.startswith("average.")}
    return own | {name.replace("|", "."): value for name, value in means.items()}


class Averaging(L.Callback):
    """Drives the module's average. Validation, pictures and exports use it. Listed before what
    reads the module's state, that is before the checkpoints."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > self.step:
            pl_module.average.update(pl_module.model, self.step)
            self.step = trainer.global_step

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.average.swap(pl_module.model)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.average.swap(pl_module.model)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.average.swap(pl_module.model)
