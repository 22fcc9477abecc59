"""The published AR generators over FlexTok's indices, by class and by text (arXiv 2502.13967, 3.3).

A text model's blocks have three norms, the second before its cross-attention; how its files name
the MLP behind the text encoder is not known here, so its two layers are found by their shapes.
"""

import re
from typing import Any

from torch import Tensor

from flextok.convert.rules import (
    Documents,
    Published,
    Rule,
    State,
    count,
    shape,
    translate,
    unknown_key,
    without_ones,
)


def _thirds(state: State, key: str) -> tuple[Tensor, ...]:
    if shape(state, key, 2)[0] % 3:
        raise ValueError(f"{key!r} has the unexpected shape {list(state[key].shape)}")
    return state[key].chunk(3)


_WQ_WK_WV = r"\1.attn.wq.weight \1.attn.wk.weight \1.attn.wv.weight"
_RULES = [
    Rule("preprocessor.cls_embedding.weight", "conditioner.embedding.weight"),
    Rule("preprocessor.embedding.weight", "embedding.weight"),
    Rule("preprocessor.positional_embedding", "positions"),
    Rule("preprocessor.sos_token_embed", "start", without_ones(leading=2)),  # (1, 1, D) -> (D,)
    Rule("trunk.(blocks.#).norm_1.weight", r"\1.norm1.weight"),
    Rule("trunk.(blocks.#.mlp.*)", r"\1"),
    Rule("trunk.post_trunk_norm.weight", "norm.weight"),
    Rule("head.linear.weight", "head.weight"),
    Rule("trunk.(blocks.#).(?:self_)?attn.qkv.weight", _WQ_WK_WV, _thirds),
    Rule("trunk.(blocks.#).(?:self_)?attn.proj.weight", r"\1.attn.proj.weight"),
]
_CLASS_RULES = [Rule("trunk.(blocks.#).norm_2.weight", r"\1.norm2.weight")]
_TEXT_RULES = [
    Rule("trunk.(blocks.#).norm_2.weight", r"\1.cross_norm.weight"),
    Rule("trunk.(blocks.#).norm_3.weight", r"\1.norm2.weight"),
    Rule("trunk.(blocks.#).cross_attn.W([qkv]).weight", r"\1.cross_attn.w\3.weight"),
    Rule("trunk.(blocks.#).cross_attn.proj.weight", r"\1.cross_attn.proj.weight"),
]
_PREFIX = "models.ar_image_model."
# models of their own, of which some files may carry copies: the tokenizer, and T5
_OTHERS = re.compile(
    r"models\.image_tokenizer\..+|(.+\.)?(shared\.weight|encoder\.(block|embed_tokens|final_).*)"
)
TEXT_ENCODER, MAX_LENGTH = "google/flan-t5-xl", 128


def is_ar(state: State) -> bool:
    return any(key.removeprefix(_PREFIX) == "preprocessor.sos_token_embed" for key in state)


def convert_ar(state: State, documents: Documents) -> Published:
    """The shapes suffice; documents beside the weights are not read."""
    generator = {key: value for key, value in state.items() if not _OTHERS.fullmatch(key)}
    ours = ar_state(generator)
    config = ar_config(ours)
    provenance: dict[str, Any] = {
        "layout": "FlexTok AR, published",
        "license": "see the model's page",
    }
    if config["conditioner"]["name"] == "text":
        provenance["assumed"] = [
            f"conditioner.encoder.model = {TEXT_ENCODER} (the paper's)",
            f"conditioner.encoder.max_length = {MAX_LENGTH} (ours)",
        ]
    if left_out := len(state) - len(generator):
        provenance["left_out"] = f"{left_out} tensors of its tokenizer or text encoder"
    return Published("gpt", config, ours, provenance)


def ar_state(published: State) -> dict[str, Tensor]:
    """A published AR state dict in our names and shapes; views, no copies."""
    published = {key.removeprefix(_PREFIX): value for key, value in published.items()}
    is_text = any(".cross_attn." in key for key in published)
    rules = _RULES + (_TEXT_RULES if is_text else _CLASS_RULES)
    unknown: dict[str, Tensor] = {}
    state = translate(published, rules, unknown if is_text else None)
    if unknown:
        state |= text_mlp(unknown, shape(state, "embedding.weight", 2)[1])
    return state


def text_mlp(tensors: State, dim: int) -> dict[str, Tensor]:
    """The MLP from a text encoder's width E over H to dim, in our names: the only two matrices,
    (H, E) and (dim, H), and their biases, zero where there are none. Raises ValueError."""
    weights = [key for key, value in tensors.items() if value.ndim == 2]
    biases = [re.sub("weight$", "bias", key) for key in weights]
    if len(weights) == 2 and set(tensors) <= {*weights, *biases}:
        for order in ((0, 1), (1, 0)):
            first, second = (tensors[weights[i]] for i in order)
            if second.shape == (dim, len(first)):
                state = {}
                for ours, weight, i in zip("02", (first, second), order, strict=True):
                    bias = tensors.get(biases[i], weight.new_zeros(len(weight)))
                    state[f"conditioner.project.{ours}.weight"] = weight
                    state[f"conditioner.project.{ours}.bias"] = bias
                return state
    raise unknown_key(next(iter(tensors)))


def ar_config(state: State) -> dict[str, Any]:
    """The config of `ar_state`'s result; a published model has as many heads as blocks."""
    vocab_size, dim = shape(state, "embedding.weight", 2)
    depth = count(state, "blocks.")
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
        encoder = {"name": "pretrained", "model": TEXT_ENCODER, "dim": width}
        config["conditioner"] = {
            "name": "text",
            "encoder": {**encoder, "max_length": MAX_LENGTH},
            "hidden_dim": hidden,
            "project": project,
        }
        config["generate"] = {"guidance_scale": 3.0}
    return config
