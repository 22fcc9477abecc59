"""Generators: conditions -> indices. base.py has the class that they all are."""

from flextok.generators.ar import GPT, GenerateOptions, GPTConfig
from flextok.generators.base import Generator
from flextok.generators.maskgit import MaskGIT, MaskGITConfig, MaskGITOptions

GENERATORS: dict[str, type[Generator]] = {"gpt": GPT, "maskgit": MaskGIT}

__all__ = [
    "GENERATORS",
    "GPT",
    "GPTConfig",
    "GenerateOptions",
    "Generator",
    "MaskGIT",
    "MaskGITConfig",
    "MaskGITOptions",
]
