"""Published MaskGIT generators over TiTok's indices: BERT-like (l32, b64) and U-ViT (s128).

Published: bytedance/1d-tokenizer's state dicts and the config.json beside them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flextok.convert.rules import Published, Rules, agree, count, rename, shape, without_ones
from flextok.convert.titok import find_section

_BERT_LAYER = r"model\.encoder\.layer\.(\d+)\."
_BERT_RULES: Rules = [
    (r"model\.embeddings\.word_embeddings\.weight", r"embedding.weight"),
    (r"model\.embeddings\.position_embeddings\.weight", r"positions"),
    (r"model\.embeddings\.token_type_embeddings\.weight", r"segments"),
    (r"model\.embeddings\.LayerNorm\.(.+)", r"norm.\1"),
    (_BERT_LAYER + r"attention\.self\.(query|key|value)\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_BERT_LAYER + r"attention\.output\.dense\.(.+)", r"blocks.\1.attn.proj.\2"),
    (_BERT_LAYER + r"attention\.output\.LayerNorm\.(.+)", r"blocks.\1.norm1.\2"),
    (_BERT_LAYER + r"intermediate\.dense\.(.+)", r"blocks.\1.fc1.\2"),
    (_BERT_LAYER + r"output\.dense\.(.+)", r"blocks.\1.fc2.\2"),
    (_BERT_LAYER + r"output\.LayerNorm\.(.+)", r"blocks.\1.norm2.\2"),
    (r"model\.lm_head\.(.+)", r"head.\1"),
]
_UVIT_RULES: Rules = [
    (r"embeddings\.weight", r"embedding.weight"),
    (r"pos_embed", r"positions"),
    (r"(norm\..+)", r"\1"),
    (r"lm_head\.(.+)", r"head.\1"),
]
_UVIT_BLOCK_RULES: Rules = [
    (r"(norm[12]\..+)", r"\1"),
    (r"(attn\.(?:qkv|proj)\..+)", r"\1"),
    (r"mlp\.(fc[12]\..+)", r"\1"),
    (r"skip_linear\.(.+)", r"skip.\1"),
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


def is_maskgit(state: Mapping[str, Tensor]) -> bool:
    return "model.embeddings.word_embeddings.weight" in state or (
        "pos_embed" in state and "embeddings.weight" in state
    )


def convert_maskgit(
    state: Mapping[str, Tensor], documents: Sequence[Mapping[str, Any]]
) -> Published:
    ours = maskgit_state(state)
    section = find_section(documents, "generator")
    config, open_points = maskgit_config(ours, section)
    provenance = {"layout": "MaskGIT, published", "license": "apache-2.0", "assumed": open_points}
    return Published("maskgit", config, ours, provenance)


def bert_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published BERT-like MaskGIT generator's state dict ("ImageBert") in our names; queries,
    keys and values of a layer become one tensor."""
    state: dict[str, Tensor] = {}
    for key, value in published.items():
        ours = rename(key, _BERT_RULES)
        if ".attn.query." in ours:
            parts = [key.replace("query", name) for name in ("query", "key", "value")]
            for part in parts:
                same_shape = shape(published, part, value.ndim) == tuple(value.shape)
                if not same_shape or published[part].dtype != value.dtype:
                    raise ValueError(f"{part!r} and {key!r} differ in shape or dtype")
            state[ours.replace("query", "qkv")] = torch.cat([published[part] for part in parts])
        elif ".attn.key." not in ours and ".attn.value." not in ours:
            state[ours] = value
    return state


def uvit_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published U-ViT MaskGIT generator's state dict ("UViTBert") in our names; no copies."""
    half = count(published, r"in_blocks\.(\d+)\.")
    state = {}
    for key, value in published.items():
        if match := re.fullmatch(r"(in_blocks\.\d+|mid_block|out_blocks\.\d+)\.(.+)", key):
            part, _, number = match[1].partition(".")
            first = {"in_blocks": 0, "mid_block": half, "out_blocks": half + 1}[part]
            ours = f"blocks.{first + int(number or 0)}.{rename(match[2], _UVIT_BLOCK_RULES, key)}"
        else:
            ours = rename(key, _UVIT_RULES)
        if ours == "positions":  # (1, 1+K, D) -> (1+K, D)
            value = without_ones(key, value, leading=1)
        state[ours] = value
    return state


def maskgit_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published MaskGIT generator's state dict, of either backbone, in our names."""
    state = uvit_state(published) if "pos_embed" in published else bert_state(published)
    # one table in this order: codes, the mask, classes, the null class
    rows = shape(state, "head.weight", 2)[0] + 1
    shape(state, "embedding.weight", 2)
    table = state.pop("embedding.weight")
    parts = {"embedding.weight": table[:rows], "conditioner.embedding.weight": table[rows:]}
    return state | parts


def maskgit_config(
    state: Mapping[str, Tensor], section: Mapping[str, Any] | None = None
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
        "depth": count(state, r"blocks\.(\d+)\."),
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
