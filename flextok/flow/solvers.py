"""ODE solvers along decreasing times, 1 -> 0: x0 = solver(velocity, noise, times).

The state is kept in float32 whatever the model's precision. No solver evaluates the velocity at
times[-1]: a network that predicts x0 has none at t = 0. So heun takes its last step by Euler, as in
EDM (arXiv 2206.00364, algorithm 1): one step's error is of second order, so the whole stays so.
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
    """Second order (explicit trapezoid), two velocities a step and one in the last."""
    x = noise.float()
    *steps, last = pairwise(times)
    for t, t_next in steps:
        v = velocity(x, t).float()
        v_next = velocity(x + (t_next - t) * v, t_next).float()
        x = x + (t_next - t) * (v + v_next) / 2
    t, t_next = last
    return x + (t_next - t) * velocity(x, t).float()


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
