"""Data: pictures from disk to batches in [-1, 1], and cached token sequences."""
