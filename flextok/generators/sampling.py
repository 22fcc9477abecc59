"""From logits to an index: temperature, top-k, nucleus (top-p), and one uniform draw inverted."""

import torch
from torch import Tensor

from flextok.schema import check_number

TEMPERATURES, MAX_SCALE = (1e-4, 1e4), 1000


def filtered_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0
) -> Tensor:
    """logits: (B, V). Returns probabilities (B, V), fp32. top_k=0 and top_p=0 (or 1) filter
    nothing; with both, top_k comes first and top_p acts on what it leaves. At least one
    index survives."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if 0.0 < top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        probabilities = ranked.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the better ones
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits.softmax(dim=-1)


def pick(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0
) -> Tensor:
    """logits: (B, V). Returns indices (B,) long from uniform draws u (B,) in [0, 1), on the device
    of both: nothing waits for it. Temperature 0 takes the most likely index."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return invert(filtered_probabilities(logits, temperature, top_k, top_p), u)


def invert(probabilities: Tensor, u: Tensor) -> Tensor:
    """probabilities: (..., V); u: (...) in [0, 1). Returns (...) long: the first index at which the
    cumulative probability exceeds u. It sums in u's precision, float64, and an index of
    probability 0 is never it."""
    cumulative = probabilities.to(u.dtype).cumsum(dim=-1).masked_fill(probabilities == 0, 0.0)
    total = cumulative.amax(dim=-1, keepdim=True)  # 1, but for rounding
    return (cumulative > u[..., None] * total).int().argmax(dim=-1)


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless it is 0 or a number that float32 logits can be divided by."""
    if temperature != 0:
        hint = ", or 0, which takes the most likely index"
        check_number("temperature", temperature, *TEMPERATURES, hint=hint)
