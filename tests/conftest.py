import base64
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from PIL import Image

from flextok.emoji.datasets import Emoji
from flextok.generators import GPT, GPTConfig
from flextok.objectives import NextTokenConfig, NextTokenObjective
from flextok.pipeline import remember_tokenizer
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

VQGAN = {
    "image_size": 16,
    "dim": 32,
    "multipliers": [1, 1, 1],
    "num_blocks": 1,
    "quantizer": {"name": "vq", "codebook_size": 12, "dim": 4, "l2_norm": False},
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


SIX_STEPS = {  # a trainer's settings
    "max_steps": 6,
    "accelerator": "cpu",
    "devices": 1,
    "log_every": 1,
    "validate_every": 3,
    "checkpoint_every": 2,
    "num_pictures": 2,
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


def tiny_tokenizer(**changes) -> FlexTok:
    model = FlexTok(FlexTokConfig(**{**TINY, **changes}))
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
    tokenizer.save_pretrained(folder / "emoji")
    tokenizer.save_pretrained(folder / "emoji-few-step")
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


CATS_AND_DOGS = [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(3)]


def draw_pictures(folder: Path, names: Iterable[str], width: int = 16, height: int = 16) -> None:
    """Pictures of noise under these names."""
    generator = torch.Generator().manual_seed(0)
    for name in names:
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / name)


def write_shard(path: Path, members: dict[str, bytes]) -> str:
    """A tar of these files. Returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def encoded(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 20, height: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(buffer, format="png")
    return buffer.getvalue()


def bomb(side: int, text: bytes = b"") -> bytes:
    """A PNG of a few bytes that says it is side x side pixels and holds `text`, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"zTXt", b"k\0\0" + zlib.compress(text))]
    parts += [(b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.fixture
def releases(tmp_path, monkeypatch) -> Path:
    """The package with tiny models in place of its own."""
    folder = tiny_releases(tmp_path / "releases")
    monkeypatch.setattr("flextok.places.RELEASES", folder)
    return folder


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def picture_folder(tmp_path):
    """Two classes of three 20x24 pictures."""
    draw_pictures(tmp_path, CATS_AND_DOGS, width=24, height=20)
    return tmp_path
