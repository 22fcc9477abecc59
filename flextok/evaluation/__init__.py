"""Evaluation: how good reconstructions are, by the number of tokens."""
