"""Generators: conditions -> indices."""

from flextok.generators.ar import GPT, GPTConfig
from flextok.generators.maskgit import MaskGIT, MaskGITConfig

GENERATORS = {"gpt": GPT, "maskgit": MaskGIT}

__all__ = ["GENERATORS", "GPT", "GPTConfig", "MaskGIT", "MaskGITConfig"]
