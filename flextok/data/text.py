"""Captions beside a token cache: each different one once, as its text encoder's row.

A frozen encoder's rows are its embeddings, which training then never computes again; those of an
encoder that is trained are indices. A folder of parts (safetensors) and a manifest, like the token
cache.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from flextok.data.processes import Process, this_process
from flextok.files import atomic_write, read_mapping, write_text
from flextok.generators.text import TextEncoder
from flextok.storage import checksum

MANIFEST = "manifest.json"


class TextCache:
    """cache[caption] -> (L,) long or (L, E) float16, as the encoder's rows. "" is always there."""

    def __init__(self, folder: str | Path, encoder: TextEncoder):
        """Raises ValueError when the folder's rows were made by another encoder, or by another
        revision of it."""
        self.folder = Path(folder)
        check_manifest(self.folder, encoder.identity())
        self.places: dict[str, tuple[int, int, int]] = {}  # part, first, last + 1
        for number, path in enumerate(sorted(self.folder.glob("part-*.safetensors"))):
            tensors = read_part(path)
            texts = unpack(tensors["captions"], tensors["caption_ends"])
            ends = tensors["row_ends"].tolist()
            spans = zip([0, *ends], ends, strict=False)
            self.places |= {t: (number, *span) for t, span in zip(texts, spans, strict=True)}
        self.map_rows()

    def map_rows(self) -> None:
        """Memory-map the rows of every part."""
        self.parts: list[Tensor] = []
        for path in sorted(self.folder.glob("part-*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.parts.append(file.get_tensor("rows"))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "places": self.places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state  # a worker that is not forked maps the files itself
        self.map_rows()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, caption: str) -> Tensor:
        part, first, last = self.places[caption]
        row = self.parts[part][first:last]
        return row if row.is_floating_point() else row.long()


def build_text_cache(
    folder: str | Path,
    encoder: TextEncoder,
    captions: Sequence[str],
    device: str | torch.device = "cpu",
    part_size: int = 4096,
    process: Process | None = None,
) -> TextCache:
    """Write the rows of "" and of each different caption into `folder`: this process's parts of
    them, less those already there; then wait for the other processes'. Raises ValueError for a
    folder made by another encoder or of other captions."""
    folder = Path(folder)
    different = list(dict.fromkeys(["", *captions]))
    digest = hashlib.sha256("\0".join(different).encode()).hexdigest()[:16]
    manifest = {**encoder.identity(), "captions": digest, "part_size": part_size}
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        check_manifest(folder, manifest, optional="captions")
    text = json.dumps(manifest, indent=2)
    write_text(folder / MANIFEST, text)
    parts = {
        folder / f"part-{number:05d}.safetensors": different[first : first + part_size]
        for number, first in enumerate(range(0, len(different), part_size))
    }
    process = process or this_process()
    mine = list(parts.items())[process.rank :: process.world_size]
    for path, some in tqdm(mine, desc="reading captions", unit_scale=part_size):
        if not path.exists():
            rows = encoder.rows(some, device)
            tensors = {"row_ends": torch.tensor([len(row) for row in rows]).cumsum(0)}
            tensors["rows"] = compact(torch.cat(rows).cpu())
            tensors["captions"], tensors["caption_ends"] = pack(some)
            metadata = {"sha256": checksum(tensors)}
            atomic_write(path, lambda p, t=tensors, m=metadata: save_file(t, p, m))  # type: ignore[misc]
    while not all(path.exists() for path in parts):
        time.sleep(1)
    cache = TextCache(folder, encoder)
    if missing := [caption for caption in different if caption not in cache.places]:
        raise ValueError(
            f"the captions in {folder} are others, they lack {missing[0]!r}: delete that folder, "
            "or name another data.token_cache"
        )
    return cache


def check_manifest(folder: Path, expected: dict[str, Any], optional: str = "") -> None:
    """optional: a key that older versions did not write."""
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} is no cache of captions: {path.name} is missing")
    try:
        found = read_mapping(path)
    except ValueError as error:
        raise ValueError(f"{error}: remove {folder} and run the same training again") from None
    for key, value in expected.items():
        if found.get(key) != value and (key != optional or key in found):
            raise ValueError(
                f"the captions in {folder} were read with {key}={found.get(key)!r}, now it is "
                f"{value!r}: delete that folder, or name another data.token_cache"
            )


def read_part(path: Path) -> dict[str, Tensor]:
    """A part's tensors, memory-mapped, checked. Those of older versions have no checksum."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}): remove it and run the same training again"
        ) from None
    if expected is not None and checksum(tensors) != expected:
        raise ValueError(f"{path} fails its checksum: remove it and run the same training again")
    if missing := {"rows", "row_ends", "captions", "caption_ends"} - tensors.keys():
        raise ValueError(f"{path} is no part of a caption cache: it lacks {min(missing)}")
    return tensors


def compact(rows: Tensor) -> Tensor:
    """Indices as int32, embeddings as float16, which must not overflow."""
    if not rows.is_floating_point():
        return rows.int()
    half = rows.half()
    if not half.isfinite().all():
        raise ValueError(
            f"embeddings reach {rows.abs().max():.0f}, beyond half precision: not cached"
        )
    return half


def pack(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Texts as bytes, one after the other, (N,) uint8, and where each ends, (n,) long."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    content = torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8)
    return content, torch.tensor([len(text) for text in encoded], dtype=torch.long).cumsum(0)


def unpack(content: Tensor, ends: Tensor) -> list[str]:
    whole = content.numpy().tobytes()
    last = ends.tolist()
    return [whole[a:b].decode("utf-8") for a, b in zip([0, *last], last, strict=False)]
