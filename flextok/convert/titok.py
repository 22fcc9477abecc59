"""Published TiTok, TA-TiTok (all stages, VQ and KL, legacy layout or not) and MaskGIT-VQGAN.

Published: bytedance/1d-tokenizer's state dicts and the config.json beside them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor

from flextok.convert.rules import (
    Published,
    Rules,
    agree,
    count,
    rename,
    shape,
    unknown_key,
    without_ones,
)

_BLOCK = r"(encoder|decoder)\.transformer\.(\d+)\."
_TITOK_RULES: Rules = [
    (r"latent_tokens", r"encoder.latent_tokens"),
    (r"(encoder|decoder)\.class_embedding", r"\1.class_token"),
    (r"(encoder|decoder)\.positional_embedding", r"\1.patch_pos"),
    (r"(encoder|decoder)\.latent_token_positional_embedding", r"\1.latent_pos"),
    (r"(encoder|decoder)\.ln_(pre|post)\.(.+)", r"\1.norm_\2.\3"),
    (_BLOCK + r"ln_([12])\.(.+)", r"\1.blocks.\2.norm\3.\4"),
    (_BLOCK + r"attn\.in_proj_(weight|bias)", r"\1.blocks.\2.attn.qkv.\3"),
    (_BLOCK + r"attn\.out_proj\.(.+)", r"\1.blocks.\2.attn.proj.\3"),
    (_BLOCK + r"mlp\.c_fc\.(.+)", r"\1.blocks.\2.fc1.\3"),
    (_BLOCK + r"mlp\.c_proj\.(.+)", r"\1.blocks.\2.fc2.\3"),
    (r"encoder\.patch_embed\.(.+)", r"encoder.patch_embed.\1"),
    (r"encoder\.conv_out\.(.+)", r"encoder.head.\1"),
    (r"decoder\.mask_token", r"decoder.mask_token"),
    (r"decoder\.decoder_embed\.(.+)", r"decoder.code_embed.\1"),
    (r"decoder\.text_guidance_proj\.(.+)", r"decoder.text_embed.\1"),
    (r"decoder\.text_guidance_positional_embedding", r"decoder.text_pos"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook"),
    (r"pixel_quantize\.embedding\.weight", r"pixel_quantizer.codebook"),
]
_TWO_STAGE_RULES: Rules = [(r"decoder\.ffn\.([02])\.(.+)", r"decoder.head.\1.\2")]
_SINGLE_STAGE_RULES: Rules = [
    (r"decoder\.ffn\.0\.(.+)", r"decoder.head.linear.\1"),
    (r"decoder\.conv_out\.(.+)", r"decoder.head.conv.\1"),
]
_CONV_RULES: Rules = [
    (r"down\.(\d+)\.block\.(.+)", r"down.\1.\2"),
    (r"((?:conv_in|mid|norm_out|conv_out)\..+)", r"\1"),
]
_VIT_SIZES = {"small": (512, 8), "base": (768, 12), "large": (1024, 24)}  # dim, depth


def is_titok(state: Mapping[str, Tensor]) -> bool:
    return "latent_tokens" in state and "decoder.decoder_embed.weight" in state


def is_vqgan(state: Mapping[str, Tensor]) -> bool:
    return "quantize.embedding.weight" in state and "decoder.conv_in.weight" in state


def convert_titok(state: Mapping[str, Tensor], documents: Sequence[Mapping[str, Any]]) -> Published:
    config, open_points = titok_config(state, find_section(documents, "vq_model"))
    provenance = {"layout": "TiTok, published", "license": "apache-2.0", "assumed": open_points}
    return Published("titok", config, titok_state(state), provenance)


def convert_vqgan(state: Mapping[str, Tensor], documents: Sequence[Mapping[str, Any]]) -> Published:
    provenance = {
        "layout": "MaskGIT-VQGAN, published",
        "license": "apache-2.0",
        "assumed": ["image_size = 256 (convolutions fit any)"],
    }
    return Published("maskgit_vqgan", vqgan_config(state), vqgan_state(state), provenance)


def find_section(documents: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The section of that name in the "model" section of a published config; empty without one."""
    for document in documents:
        model = document.get("model")
        if isinstance(model, Mapping) and isinstance(model.get(name), Mapping):
            return model[name]
    return {}


def titok_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published TiTok or TA-TiTok state dict, of any stage, in our names and shapes; views, no
    copies. Raises ValueError for an unknown key."""
    single = "decoder.conv_out.weight" in published
    rules = _TITOK_RULES + (_SINGLE_STAGE_RULES if single else _TWO_STAGE_RULES)
    levels = _levels(published, "pixel_decoder.")
    state = {}
    for key, value in published.items():
        if key.startswith("pixel_decoder."):
            state["pixel_decoder." + _conv_key(key, "pixel_decoder.", levels)] = value
            continue
        ours = rename(key, rules)
        if ours == "encoder.patch_embed.weight":  # (D, 3, p, p) -> (D, p p 3)
            shape(published, key, 4)
            value = rearrange(value, "d c p q -> d (p q c)")
        elif ours == "decoder.mask_token":  # (1, 1, D) -> (1, D)
            value = without_ones(key, value, leading=1)
        elif value.ndim == 4 and value.shape[-1] == 1:  # a 1x1 convolution is a Linear
            value = without_ones(key, value, trailing=2)
        state[ours] = value
    return state


def vqgan_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published MaskGIT-VQGAN state dict in our names; no copies."""
    levels = _levels(published, "decoder.")
    state = {}
    for key, value in published.items():
        part = key.partition(".")[0]
        if key == "quantize.embedding.weight":
            state["quantizer.codebook"] = value
        elif part in ("encoder", "decoder"):
            state[f"{part}.{_conv_key(key, part + '.', levels)}"] = value
        else:
            raise unknown_key(key)
    return state


def titok_config(
    published: Mapping[str, Tensor], section: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Our config of a published TiTok state dict (meta tensors will do) and its config's vq_model
    section, and one line for each point that stays open. Raises ValueError when the two disagree.

    Sizes come from the shapes. What is not in the shapes is read from the section, and follows the
    releases without one: l2-normalised codes and the legacy layout in two-stage models, neither in
    single-stage ones."""
    section = section or {}
    num_tokens, encoder_dim = shape(published, "latent_tokens", 2)
    patch_size = shape(published, "encoder.patch_embed.weight", 4)[-1]
    decoder_dim, code_dim = shape(published, "decoder.decoder_embed.weight", 2)
    encoder_depth = count(published, r"encoder\.transformer\.(\d+)\.")
    decoder_depth = count(published, r"decoder\.transformer\.(\d+)\.")
    two_stage = "decoder.conv_out.weight" not in published
    expected: dict[str, Any] = {
        "token_size": code_dim,
        "num_latent_tokens": num_tokens,
        "vit_enc_patch_size": patch_size,
        "vit_dec_patch_size": patch_size,
    }
    quantizer: dict[str, Any] = {"name": "kl", "dim": code_dim}
    if "quantize.embedding.weight" in published:
        codebook_size = shape(published, "quantize.embedding.weight", 2)[0]
        quantizer = {
            "name": "vq",
            "codebook_size": codebook_size,
            "dim": code_dim,
            "l2_norm": section.get("use_l2_norm", two_stage),
            "commitment": section.get("commitment_cost", 0.25),
        }
        expected["codebook_size"] = codebook_size
    legacy = section.get("is_legacy", two_stage)
    agree(section, expected)
    _check_vit_size(section.get("vit_enc_model_size"), (encoder_dim, encoder_depth))
    _check_vit_size(section.get("vit_dec_model_size"), (decoder_dim, decoder_depth))
    finetune = "pixel_quantize.embedding.weight" in published
    config: dict[str, Any] = {
        "image_size": patch_size * _grid(published),
        "patch_size": patch_size,
        "num_tokens": num_tokens,
        "head_dim": 64,
        "encoder_dim": encoder_dim,
        "encoder_depth": encoder_depth,
        "decoder_dim": decoder_dim,
        "decoder_depth": decoder_depth,
        "quantizer": quantizer,
        "stage": ("finetune" if finetune else "proxy") if two_stage else "single",
        "legacy": legacy,
    }
    if finetune:
        config["proxy"] = _vqgan_config(published, "pixel_decoder.", "pixel_quantize.")
    if "decoder.text_guidance_proj.weight" in published:
        length = shape(published, "decoder.text_guidance_positional_embedding", 2)[0]
        config["text_length"] = length
        config["text_dim"] = shape(published, "decoder.text_guidance_proj.weight", 2)[1]
    open_points = []
    if not section:
        norm = f", l2_norm = {two_stage}" if quantizer["name"] == "vq" else ""
        open_points = [f"legacy = {legacy}{norm} (no config beside the weights)"]
    return config, open_points


def vqgan_config(published: Mapping[str, Tensor], image_size: int = 256) -> dict[str, Any]:
    """Our config of a published MaskGIT-VQGAN state dict; its image size is not in the shapes."""
    return {**_vqgan_config(published, "decoder.", "quantize."), "image_size": image_size}


def _vqgan_config(published: Mapping[str, Tensor], decoder: str, quantizer: str) -> dict[str, Any]:
    levels = _levels(published, decoder)
    widths = [
        shape(published, f"{decoder}up.{level}.block.0.norm2.weight", 1)[0]
        for level in range(levels)
    ]
    (dim,) = shape(published, f"{decoder}norm_out.weight", 1)
    codebook_size, code_dim = shape(published, f"{quantizer}embedding.weight", 2)
    return {
        "dim": dim,
        "multipliers": [width // dim for width in widths],
        "num_blocks": count(published, re.escape(decoder) + r"up\.0\.block\.(\d+)\."),
        "quantizer": {
            "name": "vq",
            "codebook_size": codebook_size,
            "dim": code_dim,
            "l2_norm": False,
        },
    }


def _conv_key(whole: str, prefix: str, levels: int) -> str:
    """Our name, without prefix, of a key of the convolutional encoder or decoder. The
    published decoder counts its `levels` resolutions from fine to coarse and runs them backwards;
    ours counts as it runs."""
    key = whole.removeprefix(prefix)
    if match := re.fullmatch(r"up\.(\d+)\.(block|upsample_conv)\.(.+)", key):
        part = "up" if match[2] == "block" else match[2]
        ours = f"{part}.{levels - 1 - int(match[1])}.{match[3]}"
    else:
        ours = rename(key, _CONV_RULES, whole)
    return ours.replace(".nin_shortcut.", ".shortcut.")


def _levels(published: Mapping[str, Tensor], prefix: str) -> int:
    return count(published, re.escape(prefix) + r"up\.(\d+)\.")


def _grid(published: Mapping[str, Tensor]) -> int:
    return round((shape(published, "encoder.positional_embedding", 2)[0] - 1) ** 0.5)


def _check_vit_size(name: Any, found: tuple[int, int]) -> None:
    if name is not None and _VIT_SIZES.get(name) != found:
        raise ValueError(
            f"the config has ViT size {name!r}, the weights (dim, depth) {found}; "
            f"known: {_VIT_SIZES}"
        )
