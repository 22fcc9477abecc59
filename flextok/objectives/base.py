"""What training minimises: a module that holds the model and computes its losses on a batch."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flextok.hub import Pretrained


class Part(NamedTuple):
    """Of an objective: its gradients are clipped apart from those of the other parts."""

    module: nn.Module
    lr: float | None = None  # None = the optimizer's


class Objective(nn.Module):
    """Holds the model that is trained and exported, and what only training needs. DDP, FSDP2,
    accelerate and torch.compile wrap it and call its forward."""

    config_class: ClassVar[type]
    starts: ClassVar[tuple[str, ...]] = ()  # the trained models that it may begin with, by name
    model: Any
    config: Any
    step: int = 0  # optimizer steps done, set by whoever trains

    def __init__(self, model: Pretrained, config: Any = None, **start: Pretrained):
        super().__init__()
        self.model, self.config = model, self.config_class() if config is None else config

    def prepare(self, pretrained: bool = True) -> None:
        """Load what training needs, once, before the optimizer is made. pretrained: the networks
        that others trained with their weights."""

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """batch: "image" (B, 3, H, W) in [-1, 1] for a tokenizer; "indices" (B, k) and "label" or
        "text" for a generator; "row": the rows' numbers in the whole batch of the step, over
        processes and micro-batches, 0 .. B-1 by default. Returns scalars; "loss" is the total.

        What is drawn for a row depends on the generator's state and the row's number alone."""
        raise NotImplementedError

    def parts(self) -> list[Part]:
        """The parts whose gradients are clipped, and whose learning rates are set, apart."""
        return [Part(self)]

    def before_step(self, mean: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Called before each step of the optimizer. mean: averages a tensor over processes."""
