"""Tiny models."""

from pathlib import Path

import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from flextok.emoji.datasets import Emoji
from flextok.generators import GPT, GPTConfig
from flextok.objectives import NextTokenConfig, NextTokenObjective
from flextok.pipeline import remember_tokenizer
from flextok.schema import from_mapping
from flextok.tokenizers import FlexTok, FlexTokConfig

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "num_registers": 8,
    "head_dim": 16,
    "encoder_depth": 2,
    "encoder_dim": 32,
    "decoder_depth": 2,
    "decoder_dim": 32,
    "vae": {"name": "identity"},
    "quantizer": {"name": "fsq", "levels": [8, 5, 5]},
}


DRAWER = {"vae": {"name": "identity"}, "patch_size": 4, "dim": 32, "depth": 2, "head_dim": 16}


VQGAN = {
    "image_size": 16,
    "dim": 32,
    "multipliers": [1, 1, 1],
    "num_blocks": 1,
    "quantizer": {"name": "vq", "codebook_size": 12, "dim": 4, "l2_norm": False},
}


AUTOENCODER = {
    "image_size": 16,
    "channels": 4,
    "block_channels": [8, 16],
    "layers_per_block": 1,
    "norm_groups": 2,
}


TITOK = {
    "image_size": 16,
    "patch_size": 4,
    "num_tokens": 6,
    "head_dim": 8,
    "encoder_dim": 16,
    "encoder_depth": 1,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "quantizer": {"name": "vq", "codebook_size": 32, "dim": 4},
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter random values, so that no zero-initialised layer hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.3 / max(1, parameter.shape[-1]) ** 0.5 + 0.02 * noise)
    return model


@torch.no_grad()
def bend(decoder: torch.nn.Module) -> None:
    """Make a decoder's velocity bend, so that few Euler steps are not enough."""
    for name, parameter in decoder.named_parameters():
        if "modulation" in name or "head" in name:
            parameter.mul_(2.5)


def tiny_tokenizer(**changes) -> FlexTok:
    model = FlexTok(from_mapping(FlexTokConfig, {**TINY, **changes}))
    return randomize(model).eval()


def tiny_gpt(**changes) -> GPT:
    options = {
        "vocab_size": 200,
        "num_tokens": 8,
        "depth": 2,
        "dim": 32,
        "conditioner": {"name": "class", "num_classes": 5},
    }
    torch.manual_seed(0)
    return randomize(GPT(GPTConfig(**{**options, **changes}))).eval()


def tiny_releases(folder: Path) -> Path:
    """Tiny models by the names of those that come with the package, all else alike."""
    tokenizer = tiny_tokenizer(num_registers=256, decode={"num_steps": 1, "guidance_scale": 1.0})
    for name in ("emoji", "emoji-few-step", "emoji-one-step"):
        tokenizer.save_pretrained(folder / name)
    names = Emoji(label="subgroup").class_names
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 64}
    for name, conditioner in [
        ("emoji-class", {"name": "class", "num_classes": len(names)}),
        ("emoji-text", {"name": "text", "encoder": encoder}),
    ]:
        gpt = tiny_gpt(num_tokens=64, conditioner=conditioner)
        if name == "emoji-class":
            gpt.metadata["class_names"] = names
        remember_tokenizer(gpt, folder / name, tokenizer, str(folder / "emoji"))
        gpt.save_pretrained(folder / name)
    return folder


def overfit(model: GPT, indices: torch.Tensor, cond: object, steps: int) -> float:
    """Train on one batch. Returns the last loss."""
    objective = NextTokenObjective(model, NextTokenConfig(cond_drop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = objective({"indices": indices, "label": cond})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=384, **sizes))


def save_encoder(folder, make=t5):
    torch.manual_seed(0)
    make().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder
