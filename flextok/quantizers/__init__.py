"""Quantizers: (B, K, C) float -> codes (B, K, C), indices (B, K) and an auxiliary loss. Each takes
a generator, from which KL draws in training."""

from flextok.quantizers.fsq import FSQ
from flextok.quantizers.kl import KL
from flextok.quantizers.vq import VQ

QUANTIZERS = {"fsq": FSQ, "kl": KL, "vq": VQ}

__all__ = ["FSQ", "KL", "QUANTIZERS", "VQ"]
