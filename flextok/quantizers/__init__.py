"""Quantizers: (B, K, C) float -> codes (B, K, C), indices (B, K) and an auxiliary loss."""

from flextok.quantizers.fsq import FSQ

QUANTIZERS = {"fsq": FSQ}

__all__ = ["FSQ", "QUANTIZERS"]
