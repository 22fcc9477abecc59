"""Evaluation: how good reconstructions and generations are, and by how many tokens."""
