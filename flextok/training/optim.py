"""Parameter groups, optimizers and the learning-rate schedule."""

import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from flextok.config import OptimConfig
from flextok.nn.blocks import transformer_blocks
from flextok.objectives.base import Objective
from flextok.schema import ConfigError, unknown_key
from flextok.training.muon import Muon


def parameter_groups(objective: Objective, config: OptimConfig) -> list[dict[str, Any]]:
    """Matrices decay; vectors (biases, norms) and what config.no_decay names do not.
    config.lr_scale multiplies the rate of whole parts of the model, by their name. Frozen
    parameters are in no group."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    names = {p: name.removeprefix("model.") for name, p in objective.named_parameters()}
    parts = sorted({name.split(".")[0] for name in names.values()})
    for part in config.lr_scale:
        if part not in parts:
            raise unknown_key("part of the model", part, parts, "optim.lr_scale")
    for module, rate in objective.parts():
        for parameter in module.parameters():
            if parameter.requires_grad:
                name = names[parameter]
                spared = parameter.ndim < 2 or any(part in name for part in config.no_decay)
                decay = 0.0 if spared else config.weight_decay
                lr = (rate or config.lr) * config.lr_scale.get(name.split(".")[0], 1.0)
                groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def warmup_cosine(warmup_steps: int, max_steps: int, final: float) -> Callable[[int], float]:
    """step -> factor of the peak rate: linear from 0 over warmup_steps, then cosine to `final`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def make_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.Optimizer:
    groups, (first, second) = parameter_groups(objective, config), config.betas
    if config.name == "muon":
        return MuonAdamW(groups, muon_parameters(objective.model), (first, second))
    return fused_adamw(groups, (first, second))


def muon_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The matrices of a model's transformer blocks; of a model of convolutions, which has none, its
    kernels, but for those that read or write the three colours."""
    blocks = [p for block in transformer_blocks(model) for p in block.parameters()]
    if blocks:
        return {p for p in blocks if p.ndim == 2}
    return {p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 3}


def fused_adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW by one kernel, which leaves the unscaling of fp16 gradients to the trainer: by itself
    it would unscale them after they are clipped and checked, and so Lightning refuses to clip."""
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    optimizer._step_supports_amp_scaling = False  # torch's and Lightning's name for that
    return optimizer


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some parameters, and AdamW for all others, as one optimizer.
    Muon's updates are scaled to AdamW's size (Moonlight, arXiv 2502.16982, section 2.2), so one
    learning rate and weight decay serve all."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        by_muon: set[nn.Parameter],
        betas: tuple[float, float],
        momentum: float = 0.95,
    ):
        def those(muon: bool) -> list[dict[str, Any]]:
            split = [[p for p in g["params"] if (p in by_muon) == muon] for g in groups]
            return [{**g, "params": own} for g, own in zip(groups, split, strict=True) if own]

        if not (matrices := those(muon=True)):
            raise ConfigError(
                "optim.name=muon: of the parts that are trained none has blocks or kernels; set "
                "optim.name=adamw, or name more parts in objective.train"
            )
        self.parts: list[torch.optim.Optimizer] = [Muon(matrices, momentum)]
        if others := those(muon=False):
            self.parts.append(fused_adamw(others, betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        groups = iter(self.param_groups)
        for part in self.parts:
            # schedules and checkpoints know this optimizer's groups and state only
            part.param_groups = list(islice(groups, len(part.param_groups)))
            part.state = self.state
            part.step()
        return loss
