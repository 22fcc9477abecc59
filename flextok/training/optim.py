"""AdamW parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from torch import nn

from flextok.config import OptimConfig
from flextok.schema import unknown_key


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Matrices decay; vectors (biases, norms) and what config.no_decay names do not.
    config.lr_scale multiplies the rate of whole parts of the model, by their name. Frozen
    parameters are in no group."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    for part in config.lr_scale:
        if part not in parts:
            raise unknown_key("part of the model", part, list(parts), "optim.lr_scale")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(part in name for part in config.no_decay)
            decay = 0.0 if spared else config.weight_decay
            scale = config.lr_scale.get(name.split(".")[0], 1.0)
            groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": config.lr * scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def warmup_cosine(warmup_steps: int, max_steps: int, final: float) -> Callable[[int], float]:
    """step -> factor of the peak rate: linear from 0 over warmup_steps, then cosine to `final`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    first, second = config.betas
    return torch.optim.AdamW(
        parameter_groups(model, config),
        betas=(first, second),
        fused=True,
    )
