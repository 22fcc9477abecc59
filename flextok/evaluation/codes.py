"""What the codes themselves carry: how much of the vocabulary is used, where in the sequence, and
how many bits of a pixel that is."""

import math
from typing import Any

import torch
from torch import Tensor

from flextok.evaluation.distances import Rows


def count_positions(indices: Rows, num_tokens: int, vocab_size: int) -> Tensor:
    """indices: (n, K) rows. Returns how often each code stands at each position, (K, V) long."""
    counts = torch.zeros(num_tokens * vocab_size, dtype=torch.long)
    offsets = torch.arange(num_tokens) * vocab_size
    for start in range(0, len(indices), 1024):
        block = indices[start : start + 1024].long() + offsets
        # sorted counting: a bincount would allocate all K x V again for every block
        values, number = block.unique(return_counts=True)
        counts[values] += number
    return counts.view(num_tokens, vocab_size)


def entropy(counts: Tensor) -> Tensor:
    """counts: (..., V). Returns the entropy of each distribution in bits, (...)."""
    p = counts.double() / counts.sum(dim=-1, keepdim=True)
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(2)


def code_report(indices: Rows, num_tokens: int, vocab_size: int) -> dict[str, Any]:
    """Usage: the share of the vocabulary that occurs at all, over all positions and at each.
    Entropy in bits at each position; with n pictures none can exceed log2(n)."""
    counts = count_positions(indices, num_tokens, vocab_size)
    total = counts.sum(dim=0)
    bits = entropy(counts)
    return {
        "vocab_size": vocab_size,
        "usage": float((total > 0).double().mean()),
        "perplexity": float(2 ** entropy(total)),
        "entropy_bits": float(bits.sum()),
        "largest_entropy_bits_measurable": min(math.log2(len(indices)), math.log2(vocab_size)),
        "usage_per_position": (counts > 0).double().mean(dim=1).tolist(),
        "entropy_bits_per_position": bits.tolist(),
    }
