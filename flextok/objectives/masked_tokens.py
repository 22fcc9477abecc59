"""Masked-token prediction: the objective of MaskGIT (arXiv 2202.04200)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextok.generators import MaskGIT
from flextok.hub import Pretrained
from flextok.nn.adapters import LoraOptions
from flextok.nn.cross_entropy import cross_entropy
from flextok.objectives.base import Objective, begin_with, choose_trained, draws_of, need
from flextok.objectives.next_token import indices_and_condition
from flextok.schema import Share
from flextok.tokenizers.base import check_indices


@dataclass
class MaskedTokensConfig:
    """Keys of `objective` beside `name: masked_tokens`."""

    cond_drop: Share = 0.1  # how often training sees the null condition
    label_smoothing: Share = 0.1
    unmasked_weight: Share = 0.1  # of positions that are not masked
    train: list[str] | None = None  # parts that learn, such as [conditioner, head]; None = all
    # adapters learn, and the parts in `train` beside them; None = no part
    lora: LoraOptions | None = None


class MaskedTokensObjective(Objective):
    """The weighted, label-smoothed cross-entropy over all positions, and "accuracy" on the masked
    ones."""

    config_class = MaskedTokensConfig
    models = ("maskgit",)
    starts = ("weights",)
    model: MaskGIT
    config: MaskedTokensConfig

    def begin(self, weights: Pretrained | None = None) -> None:
        """weights: a trained model to go on from, also of other classes or fewer or more tokens
        (begin_with)."""
        if weights is not None:
            begin_with(self.model, need("weights", weights, MaskGIT))
        choose_trained(self.model, weights, self.config.lora, self.config.train)

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        indices, cond = indices_and_condition(batch, self.model.num_tokens)
        check_indices(indices, self.model.num_tokens, self.model.vocab_size, self.model.training)
        draws, device = draws_of(batch, "indices", generator), indices.device
        u_ratio = draws(torch.rand, (), device)
        masked = sample_mask(u_ratio, draws(torch.rand, tuple(indices.shape[1:]), device))
        drop = None
        if self.model.training and self.config.cond_drop > 0:
            drop = draws(torch.rand, (), device) < self.config.cond_drop
        condition = self.model.condition(cond, drop)
        hidden = indices.masked_fill(masked, self.model.mask_index)
        return self.losses(self.model.features(hidden, condition), indices, masked)

    def losses(self, features: Tensor, indices: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """features: (B, k, D), the model's; indices: (B, k) long, the truth; masked: (B, k)
        bool."""
        weights = torch.where(masked.flatten(), 1.0, self.config.unmasked_weight)
        x, truth = features.flatten(0, 1), indices.flatten()
        smoothing = self.config.label_smoothing
        loss, guesses = cross_entropy(self.model.head, x, truth, weights, smoothing, guess=True)
        right = (guesses == truth) & masked.flatten()
        return {"loss": loss, "accuracy": right.sum() / masked.sum()}


def sample_mask(u_ratio: Tensor, u_order: Tensor) -> Tensor:
    """u_ratio: (B,), u_order: (B, N), uniform in [0, 1). Returns (B, N) bool, True = masked: a
    random arccos(u) / (pi/2) of the positions, at least one."""
    number = (u_order.shape[1] * torch.acos(u_ratio) / (math.pi / 2)).round().clamp(min=1)
    return u_order.argsort(dim=-1) < number[:, None]
