"""Published weights in our names: pure maps of keys, shapes and configs.

No file is opened and no model is built here: tensors and JSON documents go in; a model type, a
config as a plain mapping and a state dict come out. The tensors are views wherever they can be.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from flextok.convert.ar import ar_config, ar_state, convert_ar, is_ar
from flextok.convert.flextok import (
    KNOWN_CLASSES,
    convert_flextok,
    flextok_config,
    flextok_state,
    is_flextok,
)
from flextok.convert.maskgit import convert_maskgit, is_maskgit, maskgit_config, maskgit_state
from flextok.convert.older import current_config
from flextok.convert.rules import Published
from flextok.convert.titok import (
    convert_titok,
    convert_vqgan,
    is_titok,
    is_vqgan,
    titok_config,
    titok_state,
    vqgan_config,
    vqgan_state,
)

__all__ = [
    "KNOWN_CLASSES",
    "Published",
    "ar_config",
    "ar_state",
    "convert_published",
    "current_config",
    "flextok_config",
    "flextok_state",
    "maskgit_config",
    "maskgit_state",
    "titok_config",
    "titok_state",
    "vqgan_config",
    "vqgan_state",
]

Documents = Sequence[Mapping[str, Any]]
# what recognises a layout by its keys, and what converts it
_LAYOUTS: list[
    tuple[
        Callable[[Mapping[str, Tensor]], bool],
        Callable[[Mapping[str, Tensor], Documents], Published],
    ]
] = [
    (is_flextok, convert_flextok),
    (is_ar, convert_ar),
    (is_titok, convert_titok),
    (is_vqgan, convert_vqgan),
    (is_maskgit, convert_maskgit),
]


def convert_published(state: Mapping[str, Tensor], documents: Documents) -> Published:
    """A published state dict, recognised by its keys, as a model of ours. documents: the mappings
    that came with it, such as a config.json and a file's metadata. Raises ValueError."""
    for recognises, converts in _LAYOUTS:
        if recognises(state):
            return converts(state, documents)
    some = ", ".join(repr(key) for key in list(state)[:3]) or "none"
    raise ValueError(
        f"the weights are of no layout that this package knows (keys: {some}, ...). Known: its own "
        "with config.json; published FlexTok, its AR generators, TiTok, MaskGIT, MaskGIT-VQGAN"
    )
