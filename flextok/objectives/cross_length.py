"""Flow from a random prefix and from all tokens at once, the first aligned to the second."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flextok.hub import Pretrained
from flextok.objectives.flow import FlowConfig, FlowObjective, Noised
from flextok.schema import Bounds, ConfigError


@dataclass
class CrossLengthConfig(FlowConfig):
    """Keys of `objective` beside `name: cross_length`."""

    weight: Annotated[float, Bounds(0)] = 1.0  # of the alignment


class CrossLengthObjective(FlowObjective):
    """Each image is decoded twice, from its random prefix ("flow") and from all tokens
    ("flow_full"), with the same noise, time and null condition. The total is their mean plus weight
    times "align", the error of the prefix's prediction against that from all tokens, detached.

    The best prediction from a prefix is the mean of the best ones from all tokens, so once those
    are right this only adds a target with less noise. After NesTok (2026), whose decoder is a ViT:
    with a flow decoder it is untested in the literature."""

    config_class = CrossLengthConfig
    config: CrossLengthConfig

    def begin(self, weights: Pretrained | None = None) -> None:
        super().begin(weights)
        if self.config.nested_dropout == "none" or not self.model.ordered:
            raise ConfigError(
                "cross_length compares prefixes: it needs a nested_dropout other than none"
            )

    def encode(self, noised: Noised) -> tuple[list[Tensor], Tensor]:
        codes, _, aux = self.model.quantizer(self.model.encoder(noised.x0))
        return [codes[g.rows] for g in noised.groups], aux

    def flow_losses(
        self, noised: Noised, codes: list[Tensor], prediction: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        full = self.predict(noised, torch.cat(codes), slice(None), None).prediction
        losses = {
            "flow": self.error(noised, prediction),
            "flow_full": self.error(noised, full),
            "align": self.error(noised, prediction, full.detach()),
        }
        mean = (losses["flow"] + losses["flow_full"]) / 2
        return mean + self.config.weight * losses["align"], losses
