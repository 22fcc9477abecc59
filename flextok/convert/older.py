"""Configs of models that this package saved before training had objectives of its own."""

from collections.abc import Mapping
from typing import Any

# keys that only training read
_TRAINING = {
    "flextok": "batch_lengths null_prob time_sampler loss_space cross_length repa",
    "titok": "batch_lengths perceptual",
    "maskgit_vqgan": "perceptual",
    "gpt": "cond_drop context_noise",
    "maskgit": "cond_drop label_smoothing unmasked_weight",
}


def current_config(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config in today's keys; one of today stays as it is."""
    unread = {*_TRAINING.get(model_type, "").split(), "checkpoint_blocks"}
    kept = {key: value for key, value in config.items() if key not in unread}
    vae = kept.get("vae")
    if isinstance(vae, Mapping) and vae.get("name") == "kl":
        # one that states no sizes had FlexTok's, whatever its weights' folder holds now
        kept["vae"] = {"channels": 16, **vae}
    dropout, distill = kept.pop("nested_dropout", None), kept.pop("distill", None)
    if dropout is not None:
        is_line = model_type == "flextok" and kept.get("token_grid") is None
        kept["ordered"] = is_line or dropout != "none"
    if isinstance(distill, Mapping):
        fixed = {"solver": "euler", "guidance_scale": 1.0, "guidance_interval": None}
        decode = kept.get("decode", {})
        if isinstance(decode, Mapping):
            kept["decode"] = {**decode, **fixed, "num_steps": distill.get("num_steps", 4)}
        kept["distilled"] = True
    return kept
