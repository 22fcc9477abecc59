"""Published weights in our names: pure maps of keys, shapes and configs.

No file is opened and no model is built here: tensors and JSON documents go in; a model type, a
config as a plain mapping and a state dict come out. The tensors are views wherever they can be.
"""

from flextok.convert import ar, autoencoder, flextok, maskgit, titok
from flextok.convert.older import current_config
from flextok.convert.rules import Documents, Published, State

__all__ = ["Published", "convert_published", "current_config"]

# what recognises a layout by its keys, and what converts it
_LAYOUTS = [
    (flextok.is_flextok, flextok.convert_flextok),
    (ar.is_ar, ar.convert_ar),
    (titok.is_titok, titok.convert_titok),
    (titok.is_vqgan, titok.convert_vqgan),
    (maskgit.is_maskgit, maskgit.convert_maskgit),
    (autoencoder.is_autoencoder, autoencoder.convert_autoencoder),
]


def convert_published(state: State, documents: Documents) -> Published:
    """A published state dict, recognised by its keys, as a model of ours. documents: the mappings
    that came with it, such as a config.json and a file's metadata. Raises ValueError."""
    for recognises, converts in _LAYOUTS:
        if recognises(state):
            return converts(state, documents)
    some = ", ".join(repr(key) for key in list(state)[:3]) or "none"
    raise ValueError(
        f"the weights are of no layout that this package reads (keys: {some}, ...). Known: its own "
        "with config.json; published FlexTok, its AR generators, TiTok, MaskGIT, MaskGIT-VQGAN, "
        "diffusers' AutoencoderKL"
    )
