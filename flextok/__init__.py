"""FlexTok: images as short, ordered token sequences."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flextok")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = ["GPT", "FlexTok", "__version__"]


def __getattr__(name: str):
    # the models import torch, which takes seconds: only when asked for
    if name == "FlexTok":
        from flextok.tokenizers import FlexTok

        return FlexTok
    if name == "GPT":
        from flextok.generators import GPT

        return GPT
    raise AttributeError(f"module 'flextok' has no attribute {name!r}")
