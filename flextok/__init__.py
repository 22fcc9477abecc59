"""FlexTok: images as short, ordered token sequences."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flextok")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_TOKENIZERS = ("FlexTok", "MaskGITVQGAN", "TiTok")
_GENERATORS = ("GPT", "MaskGIT")

__all__ = ["GPT", "FlexTok", "MaskGIT", "MaskGITVQGAN", "TiTok", "__version__"]


def __getattr__(name: str):
    # the models import torch, which takes seconds: only when asked for
    if name in _TOKENIZERS:
        from flextok import tokenizers

        return getattr(tokenizers, name)
    if name in _GENERATORS:
        from flextok import generators

        return getattr(generators, name)
    raise AttributeError(f"module 'flextok' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
