"""The built-in data: Fluent emoji, which need no download.

The shard `assets/emoji-64.tar` (made by scripts/pack_emoji.py, see assets/NOTICE.md) is a
WebDataset of 64 px WebP pictures with alpha; it is small enough to be held in memory.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from flextok.emoji.captions import noun_phrase

SPLITS = ("train", "validation", "all")


class EmojiRecord(NamedTuple):
    """One emoji of the shard."""

    key: str  # code points: "1f469-200d-1f680"
    name: str  # Unicode's short name: "woman astronaut"
    group: str
    subgroup: str
    split: str
    webp: bytes


@cache
def read_shard() -> tuple[EmojiRecord, ...]:
    """All emoji in the order of their code points, read once per process."""
    data = resources.files("flextok.emoji").joinpath("assets/emoji-64.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {m.name: f.read() for m in tar if (f := tar.extractfile(m)) is not None}
    records = []
    for name, content in files.items():
        if name.endswith(".json"):
            fields = json.loads(content)
            key = fields.pop("codepoints")
            records.append(EmojiRecord(key=key, webp=files[f"{key}.webp"], **fields))
    return tuple(records)


def select_records(split: str) -> list[EmojiRecord]:
    """The emoji of one split, or of both for "all"."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    return [r for r in read_shard() if split in ("all", r.split)]


def state_of(records: Iterable[EmojiRecord]) -> Iterator[str]:
    return (f"{r.key} {r.name} {hashlib.sha256(r.webp).hexdigest()}" for r in records)


class Emoji(Dataset[dict[str, Any]]):
    """Every emoji on white, labelled by its Unicode group (9 classes) or subgroup.

    Items: image PIL RGB, label int, caption str, key str (the code points).
    """

    def __init__(
        self,
        split: str = "train",
        label: str = "group",
        size: int | None = None,
        caption: str = "name",
    ) -> None:
        """size: pixels a side; None keeps the shard's 64. caption: name ("red heart") or phrase
        ("a red heart", as in the captions of scenes)."""
        if label not in ("group", "subgroup"):
            raise ValueError(f"label={label!r} must be group or subgroup")
        if size is not None and size < 1:
            raise ValueError(f"size={size} must be at least 1")
        if caption not in ("name", "phrase"):
            raise ValueError(f"caption={caption!r} must be name or phrase")
        self.records, self.caption = select_records(split), caption
        names = {r.key: r.group if label == "group" else r.subgroup for r in read_shard()}
        self.class_names = sorted(set(names.values()))
        self.labels = [self.class_names.index(names[r.key]) for r in self.records]
        self.size = size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        rgba = Image.open(io.BytesIO(record.webp)).convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
        if self.size is not None and self.size != image.width:
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        return {
            "image": image,
            "label": self.labels[index],
            "caption": record.name if self.caption == "name" else noun_phrase(record.name),
            "key": record.key,
        }

    def state(self) -> Iterator[str]:
        return state_of(self.records)
