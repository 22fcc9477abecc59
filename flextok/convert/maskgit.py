"""Published MaskGIT generators over TiTok's indices: BERT-like (l32, b64) and U-ViT (s128).

Published: bytedance/1d-tokenizer's state dicts and the config.json beside them.
"""

import re
from typing import Any

import torch
from torch import Tensor

from flextok.convert.rules import (
    Documents,
    Published,
    Rule,
    Section,
    State,
    agree,
    count,
    find_section,
    shape,
    translate,
    without_ones,
)


def _queries_keys_values(published: State, key: str) -> Tensor:
    """A layer's three tensors as one, from the key of its queries."""
    value = published[key]
    parts = [key.replace("query", name) for name in ("query", "key", "value")]
    for part in parts:
        same_shape = shape(published, part, value.ndim) == tuple(value.shape)
        if not same_shape or published[part].dtype != value.dtype:
            raise ValueError(f"{part!r} and {key!r} differ in shape or dtype")
    return torch.cat([published[part] for part in parts])


_LAYER = "model.encoder.layer.#."
_BERT_RULES = [
    Rule("model.embeddings.word_embeddings.weight", "embedding.weight"),
    Rule("model.embeddings.position_embeddings.weight", "positions"),
    Rule("model.embeddings.token_type_embeddings.weight", "segments"),
    Rule("model.embeddings.LayerNorm.*", r"norm.\1"),
    Rule(
        _LAYER + "attention.self.query.(weight|bias)",
        r"blocks.\1.attn.qkv.\2",
        _queries_keys_values,
    ),
    Rule(_LAYER + "attention.self.(key|value).(weight|bias)", "", lambda *_: ()),  # as above
    Rule(_LAYER + "attention.output.dense.*", r"blocks.\1.attn.proj.\2"),
    Rule(_LAYER + "attention.output.LayerNorm.*", r"blocks.\1.norm1.\2"),
    Rule(_LAYER + "intermediate.dense.*", r"blocks.\1.fc1.\2"),
    Rule(_LAYER + "output.dense.*", r"blocks.\1.fc2.\2"),
    Rule(_LAYER + "output.LayerNorm.*", r"blocks.\1.norm2.\2"),
    Rule("model.lm_head.*", r"head.\1"),
]
_UVIT_RULES = [
    Rule("embeddings.weight", "embedding.weight"),
    Rule("pos_embed", "positions", without_ones(leading=1)),  # (1, 1+K, D) -> (1+K, D)
    Rule("(norm.*)", r"\1"),
    Rule("lm_head.*", r"head.\1"),
    Rule("(blocks.#.(?:norm[12]|attn.(?:qkv|proj)).*)", r"\1"),  # as `_in_a_row` numbers them
    Rule("(blocks.#).mlp.(fc[12].*)", r"\1.\3"),
    Rule("(blocks.#).skip_linear.*", r"\1.skip.\3"),
]
# the published settings, by backbone and number of tokens
_SAMPLING: dict[tuple[str, int], dict[str, Any]] = {
    ("bert", 32): {"temperature": 9.5, "guidance_scale": 4.5},
    ("bert", 64): {"temperature": 11.0, "guidance_scale": 3.0},
    ("uvit", 128): {
        "num_steps": 64,
        "temperature": 2.8,
        "guidance_scale": 6.9,
        "guidance_decay": "power-cosine",
    },
}
_SAMPLING_KEYS = {  # published name: ours
    "num_steps": "num_steps",
    "randomize_temperature": "temperature",
    "guidance_scale": "guidance_scale",
    "guidance_decay": "guidance_decay",
    "guidance_scale_pow": "guidance_pow",
}


def is_maskgit(state: State) -> bool:
    return "model.embeddings.word_embeddings.weight" in state or (
        "pos_embed" in state and "embeddings.weight" in state
    )


def convert_maskgit(state: State, documents: Documents) -> Published:
    ours = maskgit_state(state)
    config, open_points = maskgit_config(ours, find_section(documents, "generator"))
    provenance = {"layout": "MaskGIT, published", "license": "apache-2.0", "assumed": open_points}
    return Published("maskgit", config, ours, provenance)


def _in_a_row(published: State) -> dict[str, Tensor]:
    """A U-ViT's in_blocks, mid_block and out_blocks as blocks.0, 1, ..."""
    half = count(published, "in_blocks.")

    def ours(match: re.Match[str]) -> str:
        first = {"in": 0, "out": half + 1}
        return f"blocks.{first[match[1]] + int(match[2]) if match[1] else half}."

    parts = re.compile(r"^(?:(in|out)_blocks\.(\d+)|mid_block)\.")
    return {parts.sub(ours, key): value for key, value in published.items()}


def maskgit_state(published: State) -> dict[str, Tensor]:
    """A published MaskGIT generator's state dict in our names: the BERT-like one's ("ImageBert"),
    queries, keys and values of a layer in one tensor, or the U-ViT's ("UViTBert"), as views."""
    if "pos_embed" in published:
        state = translate(_in_a_row(published), _UVIT_RULES)
    else:
        state = translate(published, _BERT_RULES)
    # one table in this order: codes, the mask, classes, the null class
    rows = shape(state, "head.weight", 2)[0] + 1
    shape(state, "embedding.weight", 2)
    table = state.pop("embedding.weight")
    parts = {"embedding.weight": table[:rows], "conditioner.embedding.weight": table[rows:]}
    return state | parts


def maskgit_config(
    state: State, section: Section | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Our config of `maskgit_state`'s result (meta tensors will do) and of its config's generator
    section, and one line for each point that stays open: heads and sampling settings are not in the
    shapes, and follow the releases without a section. Raises ValueError when shapes and section
    disagree."""
    section = section or {}
    vocab_size, dim = shape(state, "head.weight", 2)
    num_tokens = shape(state, "positions", 2)[0] - 1
    hidden = shape(state, "blocks.0.fc1.bias", 1)[0]
    num_classes = shape(state, "conditioner.embedding.weight", 2)[0] - 1
    backbone = "bert" if "segments" in state else "uvit"
    expected = {
        "hidden_size": dim,
        "intermediate_size": hidden,
        "image_seq_len": num_tokens,
        "condition_num_classes": num_classes,
    }
    agree(section, expected)
    generate = dict(_SAMPLING.get((backbone, num_tokens), {}))
    generate |= {ours: section[key] for key, ours in _SAMPLING_KEYS.items() if key in section}
    config = {
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "backbone": backbone,
        "dim": dim,
        "depth": count(state, "blocks."),
        "num_heads": section.get("num_attention_heads", 16),
        "mlp_ratio": hidden / dim,
        "conditioner": {"name": "class", "num_classes": num_classes, "learned_null": True},
        # known of the BERT-like one only
        "dropout": section.get("dropout", 0.1) if backbone == "bert" else 0.0,
        "generate": generate,
    }
    open_points = []
    if not section:
        open_points = ["num_heads = 16, sampling settings (no config beside the weights)"]
    return config, open_points
