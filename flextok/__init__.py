"""FlexTok: images as short, ordered token sequences."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flextok")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_PLACES = {
    **dict.fromkeys(("FlexTok", "FlexTokConfig", "MaskGITVQGAN", "TiTok"), "flextok.tokenizers"),
    **{"Autoencoder": "flextok.autoencoder"},
    **dict.fromkeys(("GPT", "MaskGIT"), "flextok.generators"),
    **dict.fromkeys(("load", "load_tokenizer_of"), "flextok.pipeline"),
    **{"search": "flextok.tree_search"},
    **{"list_models": "flextok.places", "make_objective": "flextok.objectives"},
    **{"fit": "flextok.training.fit", "FitOptions": "flextok.training.options"},
}

__all__ = [
    "GPT",
    "Autoencoder",
    "FitOptions",
    "FlexTok",
    "FlexTokConfig",
    "MaskGIT",
    "MaskGITVQGAN",
    "TiTok",
    "__version__",
    "fit",
    "list_models",
    "load",
    "load_tokenizer_of",
    "make_objective",
    "search",
]


def __getattr__(name: str):
    # the models import torch, which takes seconds: only when asked for
    if name not in _PLACES:
        raise AttributeError(
            f"module 'flextok' has no attribute {name!r}. Any model loads by flextok.load(NAME), "
            "from flextok.list_models(), a folder or a hub id"
        )
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
