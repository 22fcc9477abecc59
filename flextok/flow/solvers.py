"""ODE solvers along decreasing times, 1 -> 0: x0 = solver(velocity, noise, times).

The state is kept in float32 whatever the model's precision.
"""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]


def euler(velocity: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    """First order, one velocity a step. times: (S+1,) decreasing. Returns x at times[-1]."""
    x = noise.float()
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t).float()
    return x


def heun(velocity: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    """Second order (explicit trapezoid), two velocities a step. Unlike in EDM the last step is full
    too: a rectified flow's velocity is defined at t=0."""
    x = noise.float()
    for t, t_next in pairwise(times):
        v = velocity(x, t).float()
        v_next = velocity(x + (t_next - t) * v, t_next).float()
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def ab2(velocity: Velocity, noise: Tensor, times: Tensor) -> Tensor:
    """Second order with one velocity a step: Adams-Bashforth for unequal steps, Euler first. As
    cheap as Euler for the same number of steps."""
    x = noise.float()
    before: tuple[Tensor, Tensor] | None = None  # the step and velocity before
    for t, t_next in pairwise(times):
        step, v = t_next - t, velocity(x, t).float()
        slope = v if before is None else v + step / (2 * before[0]) * (v - before[1])
        x, before = x + step * slope, (step, v)
    return x


SOLVERS = {"euler": euler, "heun": heun, "ab2": ab2}
