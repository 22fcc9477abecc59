"""Guidance: wraps a conditional and a null velocity into one; for which a solver needs no change.

A scale of 1 is the conditional model, and where it is 1 the null velocity is not computed. The
scale may be a number or a function of t.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flextok.nn.devices import widest

Velocity = Callable[[Tensor, Tensor], Tensor]
Scale = float | Callable[[Tensor], float]


def scale_at(scale: Scale, t: Tensor) -> float:
    return float(scale(t)) if callable(scale) else float(scale)


def within(scale: Scale, low: float, high: float) -> Scale:
    """`scale` for times t in [low, high], none outside (arXiv 2404.07724): guidance hurts near pure
    noise and hardly matters near the data. Raises ValueError unless 0 <= low <= high <= 1."""
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval=[{low}, {high}] must be 0 <= low <= high <= 1")
    return lambda t: scale_at(scale, t) if low <= float(t) <= high else 1.0


def cfg(cond_fn: Velocity, null_fn: Velocity, scale: Scale) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): u + scale (c - u)."""
    if not callable(scale) and scale == 1:
        return cond_fn

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        c, s = cond_fn(x, t), scale_at(scale, t)
        if s == 1:
            return c
        u = null_fn(x, t)
        return u + s * (c - u)

    return velocity


def apg(
    cond_fn: Velocity,
    null_fn: Velocity,
    scale: Scale,
    momentum: float = -0.5,
    eta: float = 0.0,
    norm_threshold: float = 2.5,
) -> Velocity:
    """Adaptive projected guidance (arXiv 2410.02416, algorithm 1), with FlexTok's parameters.

    Holds the momentum of one solve: make a new one for every sample. It moves with each evaluation,
    so twice a step under heun, the second time from the time at which the next step begins; the
    guided field has a memory, so no order of convergence is promised for it.
    """
    if not callable(scale) and scale == 1:
        return cond_fn
    buffer: Tensor | float = 0.0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal buffer
        c, s = cond_fn(x, t), scale_at(scale, t)
        if s == 1:
            return c
        buffer = c - null_fn(x, t) + momentum * buffer
        d = buffer
        dims = tuple(range(1, d.ndim))
        norm = d.norm(p=2, dim=dims, keepdim=True)
        d = d * torch.clamp(norm_threshold / norm.clamp_min(1e-12), max=1.0)
        # float64 island: the projection cancels nearly parallel vectors
        wide_d, wide_c = (x.to(widest(x.device)) for x in (d, c))
        unit = wide_c / wide_c.norm(p=2, dim=dims, keepdim=True).clamp_min(1e-12)
        parallel = (wide_d * unit).sum(dim=dims, keepdim=True) * unit
        update = (wide_d - parallel + eta * parallel).to(c.dtype)
        return c + (s - 1) * update

    return velocity


GUIDANCE: dict[str, Callable[..., Velocity]] = {"cfg": cfg, "apg": apg}
