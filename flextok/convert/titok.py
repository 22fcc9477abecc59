"""Published TiTok, TA-TiTok (all stages, VQ and KL, legacy layout or not) and MaskGIT-VQGAN.

Published: bytedance/1d-tokenizer's state dicts and the config.json beside them.
"""

import re
from collections.abc import Sequence
from typing import Any

from einops import rearrange
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


def _patches(published: State, key: str) -> Tensor:
    """(D, 3, p, p) -> (D, p p 3)"""
    shape(published, key, 4)
    return rearrange(published[key], "d c p q -> d (p q c)")


_PART, _BLOCK = "(encoder|decoder).", "(encoder|decoder).transformer.#."
_linear = without_ones(trailing=2)  # a 1x1 convolution is a Linear
_TITOK_RULES = [
    Rule("latent_tokens", "encoder.latent_tokens"),
    Rule(_PART + "class_embedding", r"\1.class_token"),
    Rule(_PART + "positional_embedding", r"\1.patch_pos"),
    Rule(_PART + "latent_token_positional_embedding", r"\1.latent_pos"),
    Rule(_PART + "ln_(pre|post).*", r"\1.norm_\2.\3"),
    Rule(_BLOCK + "ln_([12]).*", r"\1.blocks.\2.norm\3.\4"),
    Rule(_BLOCK + "attn.in_proj_(weight|bias)", r"\1.blocks.\2.attn.qkv.\3"),
    Rule(_BLOCK + "attn.out_proj.*", r"\1.blocks.\2.attn.proj.\3"),
    Rule(_BLOCK + "mlp.c_fc.*", r"\1.blocks.\2.fc1.\3"),
    Rule(_BLOCK + "mlp.c_proj.*", r"\1.blocks.\2.fc2.\3"),
    Rule("encoder.patch_embed.weight", "encoder.patch_embed.weight", _patches),
    Rule("encoder.patch_embed.*", r"encoder.patch_embed.\1"),
    Rule("encoder.conv_out.weight", "encoder.head.weight", _linear),
    Rule("encoder.conv_out.*", r"encoder.head.\1"),
    Rule("decoder.mask_token", "decoder.mask_token", without_ones(leading=1)),  # (1, D)
    Rule("decoder.decoder_embed.*", r"decoder.code_embed.\1"),
    Rule("decoder.text_guidance_proj.*", r"decoder.text_embed.\1"),
    Rule("decoder.text_guidance_positional_embedding", "decoder.text_pos"),
    Rule("quantize.embedding.weight", "quantizer.codebook"),
    Rule("pixel_quantize.embedding.weight", "pixel_quantizer.codebook"),
]
_TWO_STAGE_RULES = [
    Rule("decoder.ffn.([02]).weight", r"decoder.head.\1.weight", _linear),
    Rule("decoder.ffn.([02]).*", r"decoder.head.\1.\2"),
]
_SINGLE_STAGE_RULES = [
    Rule("decoder.ffn.0.weight", "decoder.head.linear.weight", _linear),
    Rule("decoder.ffn.0.*", r"decoder.head.linear.\1"),
    Rule("decoder.conv_out.*", r"decoder.head.conv.\1"),
]
_VIT_SIZES = {"small": (512, 8), "base": (768, 12), "large": (1024, 24)}  # dim, depth


def is_titok(state: State) -> bool:
    return "latent_tokens" in state and "decoder.decoder_embed.weight" in state


def is_vqgan(state: State) -> bool:
    return "quantize.embedding.weight" in state and "decoder.conv_in.weight" in state


def convert_titok(state: State, documents: Documents) -> Published:
    config, open_points = titok_config(state, find_section(documents, "vq_model"))
    provenance = {"layout": "TiTok, published", "license": "apache-2.0", "assumed": open_points}
    return Published("titok", config, titok_state(state), provenance)


def convert_vqgan(state: State, documents: Documents) -> Published:
    provenance = {
        "layout": "MaskGIT-VQGAN, published",
        "license": "apache-2.0",
        "assumed": ["image_size = 256 (convolutions fit any)"],
    }
    return Published("maskgit_vqgan", vqgan_config(state), vqgan_state(state), provenance)


def titok_state(published: State) -> dict[str, Tensor]:
    """A published TiTok or TA-TiTok state dict, of any stage, in our names and shapes; views, no
    copies. Raises ValueError for an unknown key."""
    single = "decoder.conv_out.weight" in published
    rules = _TITOK_RULES + (_SINGLE_STAGE_RULES if single else _TWO_STAGE_RULES)
    return _shortcuts(translate(published, rules + _conv_rules(published, ["pixel_decoder"])))


def vqgan_state(published: State) -> dict[str, Tensor]:
    """A published MaskGIT-VQGAN state dict in our names; no copies."""
    codebook = Rule("quantize.embedding.weight", "quantizer.codebook")
    rules = [codebook, *_conv_rules(published, ["encoder", "decoder"])]
    return _shortcuts(translate(published, rules))


def _shortcuts(state: State) -> dict[str, Tensor]:
    return {key.replace(".nin_shortcut.", ".shortcut."): value for key, value in state.items()}


def _conv_rules(published: State, parts: Sequence[str]) -> list[Rule]:
    """For convolutional encoders and decoders of these names. A published decoder counts its
    resolutions from fine to coarse and runs them backwards; ours counts as it runs."""
    part = f"({'|'.join(parts)})."
    last = count(published, f"{parts[-1]}.up.") - 1

    def up(match: re.Match[str]) -> str:
        layer = "up" if match[3] == "block" else match[3]
        return f"{match[1]}.{layer}.{last - int(match[2])}.{match[4]}"

    return [
        Rule(part + "up.#.(block|upsample_conv).*", up),
        Rule(part + "down.#.block.*", r"\1.down.\2.\3"),
        Rule(part + "(conv_in|mid|norm_out|conv_out).*", r"\1.\2.\3"),
    ]


def titok_config(
    published: State, section: Section | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Our config of a published TiTok state dict (meta tensors will do) and its config's vq_model
    section, and one line for each point that stays open. Raises ValueError when the two disagree.

    Sizes come from the shapes. What is not in the shapes is read from the section, and follows the
    releases without one: l2-normalised codes and the legacy layout in two-stage models, neither in
    single-stage ones."""
    section = section or {}
    num_tokens, encoder_dim = shape(published, "latent_tokens", 2)
    grid = round((shape(published, "encoder.positional_embedding", 2)[0] - 1) ** 0.5)
    patch_size = shape(published, "encoder.patch_embed.weight", 4)[-1]
    decoder_dim, code_dim = shape(published, "decoder.decoder_embed.weight", 2)
    encoder_depth = count(published, "encoder.transformer.")
    decoder_depth = count(published, "decoder.transformer.")
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
        "image_size": patch_size * grid,
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


def vqgan_config(published: State, image_size: int = 256) -> dict[str, Any]:
    """Our config of a published MaskGIT-VQGAN state dict; its image size is not in the shapes."""
    return {**_vqgan_config(published, "decoder.", "quantize."), "image_size": image_size}


def _vqgan_config(published: State, decoder: str, quantizer: str) -> dict[str, Any]:
    levels = count(published, f"{decoder}up.")
    widths = [
        shape(published, f"{decoder}up.{level}.block.0.norm2.weight", 1)[0]
        for level in range(levels)
    ]
    (dim,) = shape(published, f"{decoder}norm_out.weight", 1)
    codebook_size, code_dim = shape(published, f"{quantizer}embedding.weight", 2)
    return {
        "dim": dim,
        "multipliers": [width // dim for width in widths],
        "num_blocks": count(published, f"{decoder}up.0.block."),
        "quantizer": {
            "name": "vq",
            "codebook_size": codebook_size,
            "dim": code_dim,
            "l2_norm": False,
        },
    }


def _check_vit_size(name: Any, found: tuple[int, int]) -> None:
    if name is not None and _VIT_SIZES.get(name) != found:
        raise ValueError(
            f"the config has ViT size {name!r}, the weights (dim, depth) {found}; "
            f"known: {_VIT_SIZES}"
        )
