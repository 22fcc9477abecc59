"""Pictures, shards and uploads."""

import base64
import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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


def write_idx(
    folder: Path, splits: dict[str, int], packed: bool = False, seed: int = 0
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write files in Fashion-MNIST's layout, of so many images in each split. Their classes take
    turns and are visible: class c is light in row band c. Returns pixels (n, 28, 28) and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, written = np.random.default_rng(seed), {}
    for split, number in splits.items():
        labels = (np.arange(number) % 10).astype(np.uint8)
        pixels = rng.integers(0, 60, (number, 28, 28), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label : 2 * label + 8, 4:24] += 150
        prefix = {"train": "train", "test": "t10k"}[split]
        for name, values in {"images-idx3": pixels, "labels-idx1": labels}.items():
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
            path = folder / f"{prefix}-{name}-ubyte"
            if packed:
                path = path.with_name(f"{path.name}.gz")
            content = header + values.tobytes()
            path.write_bytes(gzip.compress(content) if packed else content)
        written[split] = (pixels, labels)
    return written
