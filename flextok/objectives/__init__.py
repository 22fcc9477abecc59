"""Objectives: what training minimises. base.py has the class that they all are."""

from collections.abc import Mapping
from typing import Any

from flextok.hub import Pretrained
from flextok.objectives.adversarial import AdversarialConfig, AdversarialObjective
from flextok.objectives.autoencoder import AutoencoderObjective, AutoencoderObjectiveConfig
from flextok.objectives.base import Objective, Part
from flextok.objectives.cross_length import CrossLengthConfig, CrossLengthObjective
from flextok.objectives.distillation import DistillationConfig, DistillationObjective
from flextok.objectives.drawing import DrawingConfig, DrawingObjective
from flextok.objectives.drawing_distillation import (
    DrawingDistillationConfig,
    DrawingDistillationObjective,
)
from flextok.objectives.flow import FlowConfig, FlowObjective
from flextok.objectives.masked_tokens import MaskedTokensConfig, MaskedTokensObjective
from flextok.objectives.next_token import NextTokenConfig, NextTokenObjective
from flextok.objectives.proxy_codes import ProxyCodesObjective
from flextok.objectives.reconstruction import ReconstructionConfig, ReconstructionObjective
from flextok.schema import from_mapping, to_mapping, unknown_key
from flextok.tokenizers import FlexTok, TiTok

OBJECTIVES: dict[str, type[Objective]] = {
    "flow": FlowObjective,
    "cross_length": CrossLengthObjective,
    "distillation": DistillationObjective,
    "drawing": DrawingObjective,
    "drawing_distillation": DrawingDistillationObjective,
    "proxy_codes": ProxyCodesObjective,
    "reconstruction": ReconstructionObjective,
    "adversarial": AdversarialObjective,
    "autoencoder": AutoencoderObjective,
    "next_token": NextTokenObjective,
    "masked_tokens": MaskedTokensObjective,
}

__all__ = [
    "OBJECTIVES",
    "AdversarialConfig",
    "AdversarialObjective",
    "AutoencoderObjective",
    "AutoencoderObjectiveConfig",
    "CrossLengthConfig",
    "CrossLengthObjective",
    "DistillationConfig",
    "DistillationObjective",
    "DrawingConfig",
    "DrawingDistillationConfig",
    "DrawingDistillationObjective",
    "DrawingObjective",
    "FlowConfig",
    "FlowObjective",
    "MaskedTokensConfig",
    "MaskedTokensObjective",
    "NextTokenConfig",
    "NextTokenObjective",
    "Objective",
    "Part",
    "ProxyCodesObjective",
    "ReconstructionConfig",
    "ReconstructionObjective",
    "default_objective",
    "make_objective",
]


def default_objective(model: Pretrained) -> str:
    """The name of the objective of a model whose experiment names none."""
    if isinstance(model, TiTok) and model.config.stage == "proxy":
        return "proxy_codes"
    if isinstance(model, FlexTok) and model.drawer is not None:
        return "drawing"
    defaults = {
        **{"flextok": "flow", "autoencoder": "autoencoder"},
        **{"gpt": "next_token", "maskgit": "masked_tokens"},
    }
    return defaults.get(model.model_type, "reconstruction")


def make_objective(
    model: Pretrained,
    spec: Mapping[str, Any] | None = None,
    start: Mapping[str, Pretrained] | None = None,
) -> Objective:
    """The objective that `spec`, {"name": ..., **its config's keys}, states for a model. start: the
    trained models that it begins with, by name. Raises ConfigError."""
    options = dict(spec or {})
    name = options.pop("name", default_objective(model))
    if name not in OBJECTIVES:
        raise unknown_key("objective", name, list(OBJECTIVES))
    objective = OBJECTIVES[name]
    config: Any = from_mapping(objective.config_class, options, "objective")
    model.metadata["objective"] = {"name": name, **to_mapping(config)}  # for the model card
    return objective(model, config, **(start or {}))
