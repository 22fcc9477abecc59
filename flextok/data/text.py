"""A caption cache: each different caption of a data set once, as its text encoder's row.

A frozen encoder's rows are its embeddings, which training then never computes again; those of an
encoder that is trained are indices.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flextok.data.parts import PartStore, Rows
from flextok.data.processes import Process
from flextok.generators.text import TextEncoder


class TextCache:
    """cache[caption] -> (L,) long or (L, E) float16, as the encoder's rows. "" is always there."""

    def __init__(self, store: PartStore) -> None:
        store.verify()
        texts = store.column("caption").texts()
        self.places = {text: number for number, text in enumerate(texts)}
        self.rows = store.column("row", keep=True)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, caption: str) -> Tensor:
        row = self.rows.row(self.places[caption])
        return row if row.is_floating_point() else row.long()


class _Captions(Dataset):
    def __init__(self, captions: list[str]) -> None:
        self.captions = captions

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"caption": self.captions[index]}


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
    different = list(dict.fromkeys(["", *captions]))
    digest = hashlib.sha256("\0".join(different).encode()).hexdigest()[:16]
    identity = {**encoder.identity(), "captions": digest}
    store = PartStore.make(folder, "caption cache", identity, len(different), part_size, process)

    def compute(batch: dict[str, list[str]]) -> Rows:
        rows = [compact(row.cpu()) for row in encoder.rows(batch["caption"], device)]
        return {"row": rows, "caption": batch["caption"]}

    store.fill(_Captions(different), compute, part_size, desc="reading captions", unit="caption")
    store.wait()
    return TextCache(store)


def compact(row: Tensor) -> Tensor:
    """Indices as int32, embeddings as float16, which must not overflow."""
    if not row.is_floating_point():
        return row.int()
    half = row.half()
    if not half.isfinite().all():
        raise ValueError(
            f"embeddings reach {row.abs().max():.0f}, beyond half precision: not cached"
        )
    return half
