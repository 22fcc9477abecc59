"""Rectified-flow path and time samplers (arXiv 2209.03003; time samplers: SD3, arXiv 2403.03206).

The convention of the whole package: t=1 is noise, t=0 is data,
x_t = (1 - t) x_0 + t noise, and the velocity is v = dx_t/dt = noise - x_0.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x0, noise: (B, ...); t: (B,) in [0, 1]. Returns x_t, like x0."""
    t = t.view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0


def uniform(u: Tensor) -> Tensor:
    """u: (B,) uniform in [0, 1]. Returns times t = u."""
    return u


def mode(u: Tensor, scale: float = 0.25) -> Tensor:
    """SD3's mode sampling, 1 - u - scale (cos^2(pi u / 2) - 1 + u); scale 0.25 is FlexTok's."""
    return 1 - u - scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)


def logit_normal(u: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """sigmoid of a normal (SD3, eq. 19), through the normal's inverse CDF. Its mean shifts the
    training times: mean + log(s) gives what shift_times(., s) makes of them."""
    eps = torch.finfo(torch.float32).eps
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(eps, 1 - eps)))


def thick_tailed(
    u: Tensor, mean: float = 0.0, std: float = 1.0, uniform_share: float = 0.1
) -> Tensor:
    """logit_normal, with a share of uniform times mixed in so that none is rare (FlowMo, arXiv
    2503.11056: 10 %). Both come from the one u: below uniform_share it is stretched to [0, 1] and
    taken as it is, the rest is stretched likewise and mapped by logit_normal."""
    if not 0 < uniform_share < 1:
        raise ValueError(f"uniform_share={uniform_share} must be between 0 and 1")
    tail = u < uniform_share
    rest = (u - uniform_share) / (1 - uniform_share)
    return torch.where(tail, u / uniform_share, logit_normal(rest, mean, std))


# each maps uniform draws in [0, 1] to times in [0, 1], so that one Generator serves them all
TIME_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "mode": mode,
    "logit_normal": logit_normal,
    "thick_tailed": thick_tailed,
    "uniform": uniform,
}


def linear_times(num_steps: int) -> Tensor:
    """(num_steps + 1,) times from 1 (noise) to 0 (data)."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    return torch.arange(num_steps, -1, -1, dtype=torch.float32) / num_steps


def shift_times(times: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t) (SD3, eq. 23): times crowd near the noise for shift > 1, near
    the data for shift < 1; 0 and 1 stay."""
    if shift <= 0:
        raise ValueError(f"time_shift={shift} must be positive (1 = equal steps)")
    return shift * times / (1 + (shift - 1) * times)
