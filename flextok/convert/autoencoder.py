"""KL autoencoders in diffusers' layout (AutoencoderKL): its config.json in our terms, and back."""

from collections.abc import Mapping
from typing import Any

from flextok.convert.rules import Documents, Published, State

OURS = "_flextok"  # a key of config.json with what is ours alone; diffusers skips a key with "_"
_KIND = "AutoencoderKL"
_KEYS = {  # ours -> diffusers'
    "image_size": "sample_size",
    "channels": "latent_channels",
    "block_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "norm_groups": "norm_num_groups",
    "scaling_factor": "scaling_factor",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}
_DEFAULTS = {"norm_num_groups": 32, "scaling_factor": 0.18215}  # diffusers', of older files
_ONLY = {  # what we build, by diffusers' keys; files leave out what older versions did not have
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


def is_autoencoder(state: State) -> bool:
    return "quant_conv.weight" in state and "encoder.conv_norm_out.weight" in state


def convert_autoencoder(state: State, documents: Documents) -> Published:
    document: Mapping[str, Any] = next((d for d in documents if "latent_channels" in d), {})
    return Published(
        "autoencoder", from_diffusers(document), dict(state), {"layout": "AutoencoderKL, diffusers"}
    )


def from_diffusers(document: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys for diffusers' config.json of an AutoencoderKL. Raises ValueError for another one,
    and for what we do not build."""
    kind = document.get("_class_name")
    if kind != _KIND:
        raise ValueError(f"its config.json is of {kind}, expected {_KIND}")
    for key, value in _ONLY.items():
        if (found := document.get(key, value)) != value:
            raise ValueError(f"{key}={found!r} is not supported, only {value!r}")
    found = {ours: document.get(key, _DEFAULTS.get(key)) for ours, key in _KEYS.items()}
    if missing := [_KEYS[k] for k, v in found.items() if v is None and "latents" not in k]:
        raise ValueError(f"its config.json lacks {', '.join(missing)}")
    return found


def to_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' config.json for a config in our keys."""
    blocks = len(config["block_channels"])
    return {
        "_class_name": _KIND,
        **{theirs: config[ours] for ours, theirs in _KEYS.items()},
        **_ONLY,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "force_upcast": True,
    }
