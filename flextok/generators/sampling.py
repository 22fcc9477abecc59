"""From logits to an index: temperature, top-k, nucleus (top-p), seeded by a torch.Generator."""

from collections.abc import Sequence

import torch
from torch import Tensor


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


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """logits: (B, V). Returns indices (B,) long; temperature 0 takes the most likely one.
    generator: one for all rows, or one for each, which then do not depend on one another."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p)
    if isinstance(generator, Sequence):
        rows = zip(probabilities.split(1), generator, strict=True)
        each = [torch.multinomial(row.to(g.device), 1, generator=g) for row, g in rows]
        return torch.cat(each)[:, 0].to(logits.device)
    if generator is not None:  # draws happen where the generator lives
        drawn = torch.multinomial(probabilities.to(generator.device), 1, generator=generator)
        return drawn[:, 0].to(logits.device)
    return torch.multinomial(probabilities, 1)[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be >= 0 (0 takes the most likely index)")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be >= 0 (0 keeps all)")
    if not 0.0 <= top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be in [0, 1] (0 and 1 keep all)")
