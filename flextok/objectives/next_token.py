"""Next-token prediction: the objective of GPT."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from flextok.generators import GPT
from flextok.hub import Pretrained
from flextok.nn.adapters import LoraOptions
from flextok.nn.cross_entropy import cross_entropy
from flextok.objectives.base import Objective, begin_with, choose_trained, draws_of, need
from flextok.schema import Bounds, Share
from flextok.tokenizers.base import check_indices


@dataclass
class NextTokenConfig:
    """Keys of `objective` beside `name: next_token`."""

    cond_drop: Share = 0.1  # how often training sees the null condition
    # share of input indices, not of those predicted, that training replaces by uniform ones, as
    # sampling errors will (the noisy context of reAR, arXiv 2510.04450, at a constant share)
    context_noise: Annotated[float, Bounds(0, 1, open_high=True)] = 0.0
    train: list[str] | None = None  # parts that learn, such as [conditioner, head]; None = all
    # adapters learn, and the parts in `train` beside them; None = no part
    lora: LoraOptions | None = None


class NextTokenObjective(Objective):
    """The cross-entropy of each index given those before it, in nats; of a model with groups, given
    those of the groups before its own. Conditions are dropped and inputs replaced in training mode
    only."""

    config_class = NextTokenConfig
    models = ("gpt",)
    starts = ("weights",)
    model: GPT
    config: NextTokenConfig

    def begin(self, weights: Pretrained | None = None) -> None:
        """weights: a trained model to go on from, also of other classes or fewer or more tokens
        (begin_with)."""
        if weights is not None:
            begin_with(self.model, need("weights", weights, GPT))
        choose_trained(self.model, weights, self.config.lora, self.config.train)

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        model, config = self.model, self.config
        indices, cond = indices_and_condition(batch, model.num_tokens)
        check_indices(indices, model.num_tokens, model.vocab_size, model.training)
        drop, context = None, indices[:, :-1]
        if model.training:
            draws, device = draws_of(batch, "indices", generator), indices.device
            if config.cond_drop > 0:
                drop = draws(torch.rand, (), device) < config.cond_drop
            if config.context_noise > 0:
                shape = tuple(context.shape[1:])
                any_index = functools.partial(torch.randint, model.vocab_size)
                replaced = draws(torch.rand, shape, device) < config.context_noise
                context = torch.where(replaced, draws(any_index, shape, device), context)
        features = model.features(context, model.condition(cond, drop)).flatten(0, 1)
        weights = features.new_ones(len(features), dtype=torch.float32)
        return {"loss": cross_entropy(model.head, features, indices.flatten(), weights)[0]}


def indices_and_condition(batch: Mapping[str, Any], num_tokens: int) -> tuple[Tensor, Any]:
    """A generator's batch: indices (B, k), integers of any type, of which it may generate the first
    ones only, as long; and their prompts or labels."""
    indices = batch["indices"][:, :num_tokens]
    if not (indices.is_floating_point() or indices.dtype == torch.bool):  # which are refused
        indices = indices.long()
    return indices, batch["text"] if "text" in batch else batch["label"]
