"""Published weights in our names: pure key and shape maps, no file and no model is touched here.

FlexTok: apple/ml-flextok (tokenizer with its VAE) and the AR models' layout; the facts behind the
maps are in the papers' released files (arXiv 2502.13967).
"""

import re
from collections.abc import Mapping

from torch import Tensor

# (pattern of a published key, our key); position tables also change shape, see below
_FLEXTOK_RULES = [
    (r"vae\.vae\.(.+)", r"vae.vae.\1"),
    (r"encoder\.module_dict\.enc_patch_emb\.patch_proj\.(.+)", r"encoder.patch_embed.\1"),
    (r"encoder\.module_dict\.enc_posemb_module\.posembs", r"encoder.patch_pos"),
    (r"encoder\.module_dict\.enc_register_module\.registers", r"encoder.registers"),
    (r"encoder\.module_dict\.enc_transformer\.(blocks\..+)", r"encoder.\1"),
    (r"encoder\.module_dict\.enc_to_latents\.proj\.(.+)", r"encoder.head.\1"),
    (r"decoder\.module_dict\.dec_from_latents\.proj\.(.+)", r"decoder.code_embed.\1"),
    (r"decoder\.module_dict\.dec_registers_posemb_module\.posembs", r"decoder.register_pos"),
    (r"decoder\.module_dict\.dec_nested_dropout\.dropout_mask_token", r"decoder.mask_token"),
    (r"decoder\.module_dict\.dec_latent_dropout\.nullcond", r"decoder.null_token"),
    (r"decoder\.module_dict\.dec_noise_patch_emb\.patch_proj\.(.+)", r"decoder.patch_embed.\1"),
    (r"decoder\.module_dict\.dec_patches_posemb_module\.posembs", r"decoder.patch_pos"),
    (r"decoder\.module_dict\.dec_time_embedder\.mlp\.0\.(.+)", r"decoder.time_embed.fc1.\1"),
    (r"decoder\.module_dict\.dec_time_embedder\.mlp\.2\.(.+)", r"decoder.time_embed.fc2.\1"),
    (
        r"decoder\.module_dict\.dec_transformer\.(blocks\.\d+)\.adaLN_modulation\.1\.(.+)",
        r"decoder.\1.modulation.linear.\2",
    ),
    (r"decoder\.module_dict\.dec_transformer\.(blocks\..+)", r"decoder.\1"),
    (
        r"decoder\.module_dict\.dec_to_patches\.adaLN_modulation\.1\.(.+)",
        r"decoder.modulation.linear.\1",
    ),
    (r"decoder\.module_dict\.dec_to_patches\.proj\.(.+)", r"decoder.head.\1"),
]

_AR_RULES = [
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
_AR_PREFIX = "models.ar_image_model."


def flextok_key(published: str) -> str:
    """Our name of a published FlexTok tokenizer key. Raises ValueError for an unknown one."""
    return _rename(published, _FLEXTOK_RULES)


def flextok_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published FlexTok state dict (VAE or not) in our names and shapes; views."""
    state = {}
    for key, value in published.items():
        ours = flextok_key(key)
        if ours == "decoder.register_pos":  # (1, 1, D, K) -> (K, D)
            value = value[0, 0].T
        state[ours] = value
    return state


def ar_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published class-conditional AR state dict in our names and shapes; views, no copies."""
    state: dict[str, Tensor] = {}
    for key, value in published.items():
        ours = _rename(key.removeprefix(_AR_PREFIX), _AR_RULES)
        if ours.endswith("qkv.weight"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state[ours.replace("qkv", f"w{name}")] = part
        elif ours == "start":  # (1, 1, D) -> (D,)
            state[ours] = value[0, 0]
        else:
            state[ours] = value
    return state


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, key):
            return match.expand(replacement)
    raise ValueError(f"unknown published key {key!r}: is this the model that you think it is?")
