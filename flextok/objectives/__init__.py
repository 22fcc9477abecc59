"""Objectives: what training minimises. base.py has the class that they all are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flextok.draws import base_seed, derived_generator
from flextok.hub import Pretrained
from flextok.objectives.base import Objective, Part
from flextok.schema import from_mapping, unknown_key

__all__ = ["OBJECTIVES", "Objective", "Part", "default_objective", "make_objective"]


@dataclass
class FlowConfig:
    pass


@dataclass
class NextTokenConfig:
    pass


@dataclass
class AdversarialConfig:
    perceptual: dict[str, float] = field(default_factory=dict)


class TokenizerObjective(Objective):
    config_class = FlowConfig
    starts = ("weights", "teacher", "proxy", "first")

    def __init__(self, model: Pretrained, config: Any = None, **start: Pretrained):
        super().__init__(model, config)
        self.start = start

    def prepare(self, pretrained: bool = True) -> None:
        self.model.prepare_training(**self.start)

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        seed = base_seed(generator)
        row = batch.get("row", [0])
        own = derived_generator(seed, int(row[0]))
        shared = derived_generator(seed, -1)
        return self.model.loss(batch["image"], generator=own, shared=shared)


class GeneratorObjective(Objective):
    config_class = NextTokenConfig

    def forward(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        indices = batch["indices"][:, : self.model.num_tokens]
        own = derived_generator(base_seed(generator), int(batch.get("row", [0])[0]))
        return self.model.loss(indices, batch.get("text", batch.get("label")), generator=own)


class FlowObjective(TokenizerObjective): ...


class CrossLengthObjective(TokenizerObjective): ...


class DistillationObjective(TokenizerObjective): ...


class ProxyCodesObjective(TokenizerObjective): ...


class ReconstructionObjective(TokenizerObjective): ...


class NextTokenObjective(GeneratorObjective): ...


class MaskedTokensObjective(GeneratorObjective): ...


OBJECTIVES: dict[str, type[Objective]] = {
    "flow": FlowObjective,
    "cross_length": CrossLengthObjective,
    "distillation": DistillationObjective,
    "proxy_codes": ProxyCodesObjective,
    "reconstruction": ReconstructionObjective,
    "next_token": NextTokenObjective,
    "masked_tokens": MaskedTokensObjective,
}


def default_objective(model: Pretrained) -> str:
    """The name of the objective that a model is trained with where its experiment names none."""
    if model.model_type == "titok" and model.config.stage == "proxy":
        return "proxy_codes"
    defaults = {"flextok": "flow", "gpt": "next_token", "maskgit": "masked_tokens"}
    return defaults.get(model.model_type, "reconstruction")


def make_objective(
    model: Pretrained,
    spec: Mapping[str, Any] | None = None,
    start: Mapping[str, Pretrained] | None = None,
) -> Objective:
    """The objective that an experiment's section names, of a model and the trained ones that it
    begins with. Raises ConfigError."""
    options = dict(spec or {})
    name = options.pop("name", default_objective(model))
    if name not in OBJECTIVES:
        raise unknown_key("objective", name, list(OBJECTIVES))
    objective, given = OBJECTIVES[name], dict(start or {})
    for key in given:
        if key not in objective.starts:
            raise unknown_key("model to start from", key, list(objective.starts), "start")
    return objective(model, from_mapping(objective.config_class, options, "objective"), **given)
