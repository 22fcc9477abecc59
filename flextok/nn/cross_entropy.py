"""The cross-entropy of a generator's indices, from the features that enter its last layer.

A CPU takes most of a small generator's step for the logits of a large vocabulary: they are
converted, exponentiated and stored many times. There both they and their gradient are computed for
some rows at a time, which stay in its cache (for GPUs see Cut Cross-Entropy, arXiv 2411.09009).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

LOGITS = 2**21  # at once


def cross_entropy(
    head: nn.Linear,
    x: Tensor,
    truth: Tensor,
    weights: Tensor,
    smoothing: float = 0.0,
    guess: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """head: makes logits (N, V) of x (N, D); truth: (N,) long; weights: (N,), at least 0;
    smoothing: the share of the target that is spread over all V (label smoothing). Returns the
    weighted mean of the cross-entropy, () in nats, which can be derived once, and, asked for a
    guess, the index of each row's largest logit, (N,)."""
    weights = weights / weights.sum()
    if pays_by_rows(head, x):
        learning = [p for p in head.parameters() if p.requires_grad]
        if not torch.is_grad_enabled():
            x, learning = x.detach(), []
        return _ByRows.apply(head, truth, weights, smoothing, guess, x, *learning)
    logits = head(x).to(weights.dtype)
    nats = F.cross_entropy(logits, truth, reduction="none", label_smoothing=smoothing)
    return (nats * weights).sum(), logits.argmax(dim=1) if guess else None


def pays_by_rows(head: nn.Linear, x: Tensor) -> bool:
    """On a CPU, while there are more rows at a time than features, since each time the gradient of
    all the head's weights is added up; in their precision, which has to suffice for that."""
    rows, precise = LOGITS // head.out_features, head.weight.dtype.itemsize >= 4
    return x.is_cpu and precise and rows >= head.in_features


class _ByRows(torch.autograd.Function):
    """`cross_entropy`, with its gradient, LOGITS logits at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Linear,
        truth: Tensor,
        weights: Tensor,
        smoothing: float,
        guess: bool,
        x: Tensor,
        *learning: nn.Parameter,
    ) -> tuple[Tensor, Tensor | None]:
        learns = any(ctx.needs_input_grad)
        # of twins: the parameters' own gradients, with their hooks, wait for backward()
        twins: dict[str, Tensor] = {
            name: nn.Parameter(p.detach(), p.requires_grad) for name, p in head.named_parameters()
        }
        x_grad = torch.zeros_like(x) if learns else None
        loss, guesses = weights.new_zeros(()), torch.empty_like(truth) if guess else None
        size = LOGITS // head.out_features
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            target, weight = truth[part, None], weights[part, None]
            with torch.set_grad_enabled(learns):
                rows = x[part].detach().requires_grad_(learns)
                logits = functional_call(head, twins, (rows,))
            scores = logits.detach().to(weights.dtype)
            top = scores.amax(dim=1, keepdim=True)
            aim = scores.gather(1, target)
            if smoothing:
                aim = aim.lerp(scores.mean(dim=1, keepdim=True), smoothing)
            if guesses is not None:
                guesses[part] = scores.argmax(dim=1)
            shares = (scores - top).exp_()
            total = shares.sum(dim=1, keepdim=True)
            loss += (weight * (top + total.log() - aim)).sum()
            if x_grad is not None:  # that of a row's logits: probabilities less what they aim at
                shares.mul_(weight / total).sub_(weight * (smoothing / shares.shape[1]))
                shares.scatter_add_(1, target, weight * (smoothing - 1))
                logits.backward(shares.to(logits.dtype))
                assert rows.grad is not None
                x_grad[part] = rows.grad
        if x_grad is not None:
            learned = (twin.grad for twin in twins.values() if twin.requires_grad)
            ctx.save_for_backward(x_grad, *learned)
        if guesses is not None:
            ctx.mark_non_differentiable(guesses)
        return loss, guesses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.saved_tensors
        return (None,) * 5 + tuple(None if one is None else one * grad for one in found)
