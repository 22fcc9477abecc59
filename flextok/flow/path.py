"""Rectified-flow path and time samplers (arXiv 2209.03003; time samplers: SD3, arXiv 2403.03206).

The convention of the whole package: t=1 is noise, t=0 is data,
x_t = (1 - t) x_0 + t noise, and the velocity is v = dx_t/dt = noise - x_0.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor

from flextok.nn.devices import to_device
from flextok.schema import Bounds

Quantity = Literal["velocity", "x0"]  # what a network predicts, or an error is measured of
MIN_TIME = 0.05  # bounds the weight of errors near the data (JiT, arXiv 2511.13720)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x0, noise: (B, ...); t: (B,) in [0, 1]. Returns x_t, like x0."""
    t = as_column(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    return noise - x0


def velocity_of(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity at x_t and t, (B,) or (), of the path from x0: (x_t - x0) / t. It is not defined
    at t = 0, so solvers never evaluate there."""
    return (x_t - x0) / as_column(t, x_t)


def x0_of(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Where the path with this velocity at x_t and t, (B,) or (), begins: x_t - t v."""
    return x_t - as_column(t, x_t) * velocity


def flow_error(
    prediction: Tensor, target: Tensor, t: Tensor, predicts: Quantity, space: Quantity
) -> Tensor:
    """Mean squared error in `space` of a prediction; it and its target are what `predicts` names.

    At one x_t an error of x0 is t times one of the velocity. In the other direction t is at least
    MIN_TIME, which bounds the weight of errors near the data but moves no target."""
    error = prediction.float() - target.float()
    if predicts != space:
        time = as_column(t, error)
        error = error * time if space == "x0" else error / time.clamp_min(MIN_TIME)
    return error.square().mean()


def as_column(t: Tensor, like: Tensor) -> Tensor:
    """t: (B,) or (). Returns it in a shape that multiplies `like` (B, ...), on its device; a single
    number stays where it is."""
    return t if t.ndim == 0 else to_device(t, like.device).view(-1, *[1] * (like.ndim - 1))


Deviation = Annotated[float, Bounds(0, open_low=True)]


def uniform(u: Tensor) -> Tensor:
    """u: (B,) uniform in [0, 1]. Returns times t = u."""
    return u


def mode(u: Tensor, scale: Annotated[float, Bounds(-1, 1.75)] = 0.25) -> Tensor:
    """SD3's mode sampling, 1 - u - scale (cos^2(pi u / 2) - 1 + u); scale 0.25 is FlexTok's. It is
    monotone from -1 to 2 / (pi - 2), about 1.752."""
    return 1 - u - scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)


def logit_normal(u: Tensor, mean: float = 0.0, std: Deviation = 1.0) -> Tensor:
    """sigmoid of a normal (SD3, eq. 19), through the normal's inverse CDF. Its mean shifts the
    training times: mean + log(s) gives what shift_times(., s) makes of them."""
    eps = torch.finfo(torch.float32).eps
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(eps, 1 - eps)))


def thick_tailed(
    u: Tensor, mean: float = 0.0, std: Deviation = 1.0, uniform_share: float = 0.1
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
