"""The published AR generators over FlexTok's indices, by class and by text (arXiv 2502.13967, 3.3).

A text model's blocks have three norms, the second before its cross-attention; how its files name
the MLP behind the text encoder is not known here, so its two layers are found by their shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flextok.convert.rules import Published, Rules, count, rename, shape, unknown_key, without_ones

_RULES: Rules = [
    (r"preprocessor\.cls_embedding\.weight", r"conditioner.embedding.weight"),
    (r"preprocessor\.embedding\.weight", r"embedding.weight"),
    (r"preprocessor\.positional_embedding", r"positions"),
    (r"preprocessor\.sos_token_embed", r"start"),
    (r"trunk\.(blocks\.\d+)\.norm_1\.weight", r"\1.norm1.weight"),
    (r"trunk\.(blocks\.\d+\.mlp\..+)", r"\1"),
    (r"trunk\.post_trunk_norm\.weight", r"norm.weight"),
    (r"head\.linear\.weight", r"head.weight"),
]
_CLASS_RULES: Rules = [
    (r"trunk\.(blocks\.\d+)\.norm_2\.weight", r"\1.norm2.weight"),
    (r"trunk\.(blocks\.\d+)\.attn\.(proj|qkv)\.weight", r"\1.attn.\2.weight"),
]
_TEXT_RULES: Rules = [
    (r"trunk\.(blocks\.\d+)\.norm_2\.weight", r"\1.cross_norm.weight"),
    (r"trunk\.(blocks\.\d+)\.norm_3\.weight", r"\1.norm2.weight"),
    (r"trunk\.(blocks\.\d+)\.self_attn\.(proj|qkv)\.weight", r"\1.attn.\2.weight"),
    (r"trunk\.(blocks\.\d+)\.cross_attn\.W([qkv])\.weight", r"\1.cross_attn.w\2.weight"),
    (r"trunk\.(blocks\.\d+)\.cross_attn\.proj\.weight", r"\1.cross_attn.proj.weight"),
]
_PREFIX = "models.ar_image_model."
# models of their own, of which some files may carry copies: the tokenizer, and T5
_OTHERS = re.compile(
    r"models\.image_tokenizer\..+|(.+\.)?(shared\.weight|encoder\.(block|embed_tokens|final_).*)"
)
TEXT_ENCODER = "google/flan-t5-xl"


def is_ar(state: Mapping[str, Tensor]) -> bool:
    return any(key.removeprefix(_PREFIX) == "preprocessor.sos_token_embed" for key in state)


def convert_ar(state: Mapping[str, Tensor], documents: Sequence[Mapping[str, Any]]) -> Published:
    """The shapes suffice; documents beside the weights are not read."""
    generator = {key: value for key, value in state.items() if not _OTHERS.fullmatch(key)}
    ours = ar_state(generator)
    config = ar_config(ours)
    provenance: dict[str, Any] = {
        "layout": "FlexTok AR, published",
        "license": "see the model's page",
    }
    if config["conditioner"]["name"] == "text":
        encoder = config["conditioner"]["encoder"]
        provenance["assumed"] = [
            f"conditioner.encoder.{key} = {encoder[key]} ({why})"
            for key, why in (("model", "the paper's"), ("max_length", "ours"))
        ]
    if len(generator) < len(state):
        provenance["left_out"] = (
            f"{len(state) - len(generator)} tensors of its tokenizer or text encoder"
        )
    return Published("gpt", config, ours, provenance)


def ar_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published AR state dict in our names and shapes; views, no copies."""
    is_text = any(".cross_attn." in key for key in published)
    rules = _RULES + (_TEXT_RULES if is_text else _CLASS_RULES)
    state: dict[str, Tensor] = {}
    unknown: dict[str, Tensor] = {}
    for key, value in published.items():
        name = key.removeprefix(_PREFIX)
        if is_text and not any(re.fullmatch(pattern, name) for pattern, _ in rules):
            unknown[key] = value
            continue
        ours = rename(name, rules)
        if ours.endswith("qkv.weight"):
            if len(value) % 3:
                raise ValueError(f"{key!r} has the unexpected shape {list(value.shape)}")
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[ours.replace("qkv", f"w{name}")] = part
        elif ours == "start":  # (1, 1, D) -> (D,)
            state[ours] = without_ones(key, value, leading=2)
        else:
            state[ours] = value
    if unknown:
        state |= text_mlp(unknown, shape(state, "embedding.weight", 2)[1])
    return state


def text_mlp(tensors: Mapping[str, Tensor], dim: int) -> dict[str, Tensor]:
    """The MLP from a text encoder's width E over H to dim, in our names: the only two matrices,
    (H, E) and (dim, H), and their biases, zero where there are none. Raises ValueError."""
    weights = [key for key, value in tensors.items() if value.ndim == 2]
    biases = [re.sub("weight$", "bias", key) for key in weights]
    for first, second in ((0, 1), (1, 0)):
        if len(weights) != 2 or not set(tensors) <= {*weights, *biases}:
            break
        if tensors[weights[second]].shape == (dim, len(tensors[weights[first]])):
            state = {}
            for ours, i in (("0", first), ("2", second)):
                weight = tensors[weights[i]]
                state[f"conditioner.project.{ours}.weight"] = weight
                bias = tensors.get(biases[i], weight.new_zeros(len(weight)))
                state[f"conditioner.project.{ours}.bias"] = bias
            return state
    raise unknown_key(next(iter(tensors)))


def ar_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of `ar_state`'s result; a published model has as many heads as blocks."""
    vocab_size, dim = shape(state, "embedding.weight", 2)
    depth = count(state, r"blocks\.(\d+)\.")
    config: dict[str, Any] = {
        "vocab_size": vocab_size,
        "num_tokens": shape(state, "positions", 2)[0],
        "depth": depth,
        "dim": dim,
        "num_heads": depth,
        "conditioner": {"name": "none"},
    }
    if "conditioner.embedding.weight" in state:
        num_classes = len(state["conditioner.embedding.weight"])
        config["conditioner"] = {"name": "class", "num_classes": num_classes}
    elif "blocks.0.cross_attn.wk.weight" in state:
        project = "conditioner.project.0.weight" in state
        hidden, width = shape(state, "conditioner.project.0.weight", 2) if project else (None, dim)
        config["conditioner"] = {
            "name": "text",
            "encoder": {
                "name": "pretrained",
                "model": TEXT_ENCODER,
                "dim": width,
                "max_length": 128,
            },
            "hidden_dim": hidden,
            "project": project,
        }
        config["generate"] = {"guidance_scale": 3.0}
    return config
