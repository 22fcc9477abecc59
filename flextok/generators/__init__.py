"""Generators: conditions -> indices."""

from flextok.generators.ar import GPT, GPTConfig

GENERATORS = {"gpt": GPT}

__all__ = ["GENERATORS", "GPT", "GPTConfig"]
