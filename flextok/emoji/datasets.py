"""The built-in data: Fluent emoji, which need no download.

The shard `assets/emoji-64.tar` (made by scripts/pack_emoji.py, see assets/NOTICE.md) is a
WebDataset of 64 px WebP pictures with alpha; it is small enough to be held in memory.
`assets/emoji-styles-64.tar` (made by scripts/pack_emoji_styles.py) has the same emoji in Fluent's
two other styles, colour and flat.
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
STYLES = ("3d", "colour", "flat")


class EmojiRecord(NamedTuple):
    """One emoji in one style."""

    key: str  # code points: "1f469-200d-1f680"
    name: str  # Unicode's short name: "woman astronaut"
    group: str
    subgroup: str
    split: str
    webp: bytes
    style: str = "3d"  # one of STYLES


@cache
def read_shard(file: str = "emoji-64.tar") -> tuple[EmojiRecord, ...]:
    """The pictures of a shard in its order, style by style and there by code points, read once per
    process."""
    data = resources.files("flextok.emoji").joinpath(f"assets/{file}").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = {m.name: f.read() for m in tar if (f := tar.extractfile(m)) is not None}
    records = []
    for name, content in files.items():
        if name.endswith(".json"):
            fields = json.loads(content)
            key, webp = fields.pop("codepoints"), files[name.removesuffix(".json") + ".webp"]
            records.append(EmojiRecord(key=key, webp=webp, **fields))
    return tuple(records)


def select_records(split: str, style: str = "3d") -> list[EmojiRecord]:
    """The emoji of one split, or of both for "all"; of one style, or of every style for "all"."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if style not in (*STYLES, "all"):
        raise ValueError(f"style={style!r} must be all or one of {', '.join(STYLES)}")
    records = read_shard() if style in ("3d", "all") else ()
    if style != "3d":
        records += read_shard("emoji-styles-64.tar")
    return [r for r in records if split in ("all", r.split) and style in ("all", r.style)]


def state_of(records: Iterable[EmojiRecord]) -> Iterator[str]:
    return (f"{r.key} {r.name} {hashlib.sha256(r.webp).hexdigest()}" for r in records)


class Emoji(Dataset[dict[str, Any]]):
    """Every emoji on white, labelled by its Unicode group (9 classes) or subgroup.

    Items: image PIL RGB, label int, caption str, key str (the code points, the same in each style).
    """

    def __init__(
        self,
        split: str = "train",
        label: str = "group",
        size: int | None = None,
        caption: str = "name",
        style: str = "3d",
    ) -> None:
        """size: pixels a side; None keeps the shard's 64. caption: name ("red heart") or phrase
        ("a red heart", as in the captions of scenes). style: 3d, colour, flat, or all three: an
        emoji has the same split in each."""
        if label not in ("group", "subgroup"):
            raise ValueError(f"label={label!r} must be group or subgroup")
        if size is not None and size < 1:
            raise ValueError(f"size={size} must be at least 1")
        if caption not in ("name", "phrase"):
            raise ValueError(f"caption={caption!r} must be name or phrase")
        self.records, self.caption = select_records(split, style), caption
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
