"""AdamW parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable

import torch
from torch import nn

from flextok.config import OptimConfig

NO_DECAY = ("embedding", "registers", "positions", "register_pos", "token", "start")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; vectors (biases, norms), embeddings, positions and learned tokens do not.
    Frozen parameters are in no group."""
    decay, keep = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = any(part in name for part in NO_DECAY)
        (keep if parameter.ndim < 2 or is_token else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(first, second),
        fused=True,
    )
