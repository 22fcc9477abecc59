"""How a flow decoder solves, whichever network it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from flextok.flow.guidance import GUIDANCE, Scale, Velocity, within
from flextok.flow.path import as_column, linear_times, shift_times
from flextok.flow.solvers import SOLVERS
from flextok.nn.devices import widest
from flextok.schema import Size, build, check_number

MAX_STEPS, MAX_SCALE = 10_000, 1000  # of a decoder; more of them are a mistake


@dataclass
class DecodeOptions:
    """How decode() solves; the defaults are FlexTok's (appendix: 20 steps, APG 7.5)."""

    num_steps: int = 20
    solver: str = "euler"  # euler, heun, ab2
    guidance: dict[str, Any] = field(default_factory=lambda: {"name": "apg"})  # apg, cfg
    guidance_scale: float = 7.5  # 1 = none; in decode() a function of t, too
    guidance_interval: list[float] | None = None  # times [low, high] that are guided; None = all
    time_shift: float = 1.0  # > 1: more of the steps near the noise, see flow.path.shift_times
    # of the initial noise, from one token and from all of them; between, linear in their number.
    # Below 1 it draws more typical images (a temperature: Glow, arXiv 1807.03039, section 6)
    noise_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    height: Size | None = None  # of the images, in pixels; None = the square's
    width: Size | None = None

    def __post_init__(self) -> None:
        build(SOLVERS, self.solver, "solver")
        build(GUIDANCE, self.guidance, "guidance")
        check_number("num_steps", self.num_steps, 1, MAX_STEPS, whole=True)
        if not callable(self.guidance_scale):  # decode() takes a function of t, too
            check_number("guidance_scale", self.guidance_scale, 0, MAX_SCALE, hint=" (1 = none)")
        check_number("time_shift", self.time_shift, 0.001, 1000, hint=" (1 = equal steps)")
        if self.guidance_interval is not None:
            if len(self.guidance_interval) != 2:
                raise ValueError(f"guidance_interval={self.guidance_interval} must be [low, high]")
            within(1.0, *self.guidance_interval)
        if len(self.noise_scale) != 2:
            raise ValueError(f"noise_scale={self.noise_scale} must be [from one token, from all]")
        self.noise_scale = list(self.noise_scale)
        for scale in self.noise_scale:
            check_number("noise_scale", scale, 0, 10, hint=" (1 = as trained)")

    def times(self) -> Tensor:
        """(num_steps + 1,) times from 1 to 0."""
        return shift_times(linear_times(self.num_steps), self.time_shift)

    def scaled(self, noise: Tensor, keep: Tensor, num_tokens: int) -> Tensor:
        """Initial noise (B, ...) times the scale of its number of tokens. keep: (B,) long."""
        one, full = self.noise_scale
        scale = one + (full - one) * (keep.to(widest(keep.device)) - 1) / max(num_tokens - 1, 1)
        return noise * as_column(scale.to(noise.dtype), noise)


class Conditions(NamedTuple):
    """Velocities as functions of x_t and t."""

    given: Velocity
    null: Velocity  # without the condition, for guidance


def solve(
    conditions: Conditions,
    x: Tensor,
    options: DecodeOptions,
    callback: Callable[[int, Tensor], None] | None = None,
    times: Tensor | None = None,
) -> Tensor:
    """x: (B, C, h, w) at times[0]; callback: called after each velocity, guided or not, with the
    number of them so far and the x_0 (B, C, h, w) fp32 that the last one predicts; times: (S+1,),
    decreasing, those of options by default. Returns x at times[-1], fp32."""
    calls = 0
    # the times stay on the CPU: reading one never waits for a GPU
    times = options.times() if times is None else times
    scale: Scale = options.guidance_scale
    if options.guidance_interval is not None:
        scale = within(scale, *options.guidance_interval)
    guided = build(GUIDANCE, options.guidance, "guidance")(conditions.given, conditions.null, scale)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        v = guided(x, t)
        calls += 1
        if callback is not None:
            callback(calls, x - t * v.float())  # x_t = x_0 + t v
        return v

    return build(SOLVERS, options.solver, "solver")(velocity, x, times)
