"""The published class-conditional AR generators over FlexTok's indices (arXiv 2502.13967, 3.3)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flextok.convert.rules import Published, Rules, count, rename, shape, without_ones

_RULES: Rules = [
    (r"preprocessor\.cls_embedding\.weight", r"conditioner.embedding.weight"),
    (r"preprocessor\.embedding\.weight", r"embedding.weight"),
    (r"preprocessor\.positional_embedding", r"positions"),
    (r"preprocessor\.sos_token_embed", r"start"),
    (r"trunk\.(blocks\.\d+)\.norm_1\.weight", r"\1.norm1.weight"),
    (r"trunk\.(blocks\.\d+)\.norm_2\.weight", r"\1.norm2.weight"),
    (r"trunk\.(blocks\.\d+)\.attn\.proj\.weight", r"\1.attn.proj.weight"),
    (r"trunk\.(blocks\.\d+)\.attn\.qkv\.weight", r"\1.attn.qkv.weight"),
    (r"trunk\.(blocks\.\d+\.mlp\..+)", r"\1"),
    (r"trunk\.post_trunk_norm\.weight", r"norm.weight"),
    (r"head\.linear\.weight", r"head.weight"),
]
_PREFIX = "models.ar_image_model."
_TOKENIZER = "models.image_tokenizer."  # a copy that some files may carry; a model of its own


def is_ar(state: Mapping[str, Tensor]) -> bool:
    return any(key.removeprefix(_PREFIX) == "preprocessor.sos_token_embed" for key in state)


def convert_ar(state: Mapping[str, Tensor], documents: Sequence[Mapping[str, Any]]) -> Published:
    """The shapes say all; documents beside the weights are not read."""
    generator = {key: value for key, value in state.items() if not key.startswith(_TOKENIZER)}
    if any(".cross_attn." in key for key in state):
        raise ValueError(
            "these are text-conditional AR weights: only class-conditional ones have a counterpart"
        )
    ours = ar_state(generator)
    provenance: dict[str, Any] = {
        "layout": "FlexTok AR, published",
        "license": "see the model's page",
    }
    if len(generator) < len(state):
        provenance["left_out"] = f"{len(state) - len(generator)} tensors of {_TOKENIZER}*"
    return Published("gpt", ar_config(ours), ours, provenance)


def ar_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published class-conditional AR state dict in our names and shapes; views, no copies."""
    state: dict[str, Tensor] = {}
    for key, value in published.items():
        ours = rename(key.removeprefix(_PREFIX), _RULES)
        if ours.endswith("qkv.weight"):
            if len(value) % 3:
                raise ValueError(f"{key!r} has the unexpected shape {list(value.shape)}")
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[ours.replace("qkv", f"w{name}")] = part
        elif ours == "start":  # (1, 1, D) -> (D,)
            state[ours] = without_ones(key, value, leading=2)
        else:
            state[ours] = value
    return state


def ar_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of `ar_state`'s result; a published model has as many heads as blocks."""
    vocab_size, dim = shape(state, "embedding.weight", 2)
    depth = count(state, r"blocks\.(\d+)\.")
    conditioner: dict[str, Any] = {"name": "none"}
    if "conditioner.embedding.weight" in state:
        num_classes = len(state["conditioner.embedding.weight"])
        conditioner = {"name": "class", "num_classes": num_classes}
    return {
        "vocab_size": vocab_size,
        "num_tokens": shape(state, "positions", 2)[0],
        "depth": depth,
        "dim": dim,
        "num_heads": depth,
        "conditioner": conditioner,
    }
