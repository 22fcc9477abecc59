"""WebDataset shards (tar) as data sets: local ones read at random, any ones (see openers) as
streams. What is damaged is counted, named and left out; it never stops a run."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from flextok.data.labels import captioned, check_names, find_class, index_labels, label_table
from flextok.data.openers import is_remote, parse_fetch
from flextok.data.pictures import EXTENSIONS, UNLABELLED, CorruptPicture, load_picture, read_text
from flextok.data.shards import (
    SHARD_ERRORS,
    LocalMembers,
    Raw,
    expand_shards,
    find_captions,
    find_label,
    read_member,
    state_of,
    stated_counts,
    stream_samples,
    whole_samples,
)
from flextok.data.stream import SkipCounter

IMAGE_KEY = ";".join(extension[1:] for extension in EXTENSIONS)


class WebDatasetImages(Dataset[dict[str, Any]]):
    """Local WebDataset shards (tar), read at random: each is indexed once, by member offset.

    Keys are alternatives joined by ";", the first that a sample has counts: an extension ("cls") or
    a field of its .json. Labels are class names or, where no class has that name, class numbers.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        image_key: str = IMAGE_KEY,
        label_key: str | None = "cls;label",
        caption_key: str = "txt;caption",
        class_names: Sequence[str] | int | None = None,
    ) -> None:
        """urls: paths, with {000..012} or * where there are many. label_key None: one class."""
        self.shards = expand_shards(urls)
        if remote := [shard for shard in self.shards if is_remote(shard)]:
            raise ValueError(f"urls={remote[0]!r} is remote: take name webdataset_stream for it")
        self.caption_key = caption_key
        self.keys: list[str] = []
        rows: list[tuple[int, ...]] = []
        labels: list[int | str] = []
        skips = SkipCounter()
        for number, shard in enumerate(self.shards):
            for key, spans in whole_samples(shard, skips):
                members = LocalMembers(shard, spans)
                name = f"{shard}: {key}"
                image = next((spans[k] for k in image_key.split(";") if k in spans), (0, -1))
                try:
                    label = (
                        UNLABELLED if label_key is None else find_label(members, label_key, name)
                    )
                except CorruptPicture as error:
                    skips.skip(error)
                    continue
                if label is None:
                    raise ValueError(
                        f"label_key={label_key!r} is not in {name}, which has "
                        f"{', '.join(spans)}; name another or set label_key to null"
                    )
                text = spans.get(next((k for k in caption_key.split(";") if k in spans), ""))
                record = spans.get("json")
                self.keys.append(key)
                labels.append(label)
                rows.append((number, *image, *(text or (0, -1)), *(record or (0, -1))))
        # arrays, not objects: a data set of millions is shared between workers without copies
        self.table = np.array(rows, dtype=np.int64).reshape(-1, 7)
        if not rows:
            raise ValueError(f"urls={urls!r}: no sample can be read; see the warnings above")
        if (self.table[:, 2] < 0).all():
            raise ValueError(f"image_key={image_key!r} is in no sample of urls={urls!r}")
        self.class_names, self.labels = index_labels(labels, class_names)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = self.shards[self.table[index, 0]]
        offsets = self.table[index, 1:].reshape(3, 2).tolist()
        image, text, record = (None if size < 0 else (offset, size) for offset, size in offsets)
        key, label = self.keys[index], self.labels[index]
        name = f"{shard}: {key}"
        if image is None:
            raise CorruptPicture(name, "the sample holds no picture")
        captions: list[str] = []
        if text is not None:
            captions = [read_text(read_member(shard, text), name)]
        elif record is not None:
            members = LocalMembers(shard, {"json": record})
            captions = find_captions(members, self.caption_key, name)
        return {
            "image": load_picture(read_member(shard, image), name),
            "label": label,
            **captioned(captions, self.class_names[label]),
            "key": key,
        }

    def state(self) -> Iterator[str]:
        for shard in self.shards:
            yield f"{shard} {state_of(shard)}"


@dataclass
class Cursor:
    """A place in an opened shard."""

    shard: int = -1
    next: int = 0  # sample
    samples: Iterator[Raw] = field(default_factory=lambda: iter(()))
    process: int = field(default_factory=os.getpid)  # a forked one must not read along
    damage: CorruptPicture | None = None


class WebDatasetStream(Dataset[dict[str, Any]]):
    """WebDataset shards, local or remote, read from their beginning to their end.

    Its length, hence an epoch's, is stated: by an index file (see `flextok index`), by `samples`
    for each shard, or counted in local shards. Training reads it through ShardStream; taken by
    index it is quick in ascending order only. A shard that holds fewer samples than stated is
    damaged: the missing ones count as unreadable.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        samples: int | None = None,
        class_names: Sequence[str] | int | None = None,
        image_key: str = IMAGE_KEY,
        label_key: str | None = "cls;label",
        caption_key: str = "txt;caption",
        shuffle: int = 1000,
        fetch: str | Sequence[str] | None = None,
    ) -> None:
        """urls: paths and URLs with {000..012}, or an index file (.json). class_names: names, or
        their number where the labels are numbers. Keys as in WebDatasetImages. shuffle: so many
        samples in a row, in each reader's part of the shuffled shards, are held and shuffled.
        fetch: a command that writes the shard {url} to its standard output, for addresses that are
        not http(s); it is run without a shell."""
        if shuffle < 1:
            raise ValueError(f"shuffle={shuffle} must be at least 1: samples shuffled at a time")
        if label_key is None:
            class_names = [UNLABELLED]
        elif class_names is None:
            raise ValueError(
                "a stream's labels are not known beforehand: give class_names, a list or how many "
                "numbers there are, or label_key=null for data without labels"
            )
        self.class_names = check_names(class_names)
        self.table = label_table(self.class_names)
        self.fetch = parse_fetch(fetch)
        self.shards, self.counts = stated_counts(urls, samples, self.fetch)
        self.ends = np.cumsum(self.counts)
        if not self.ends[-1]:
            raise ValueError(f"urls={urls!r} hold no sample that can be read")
        self.image_key, self.label_key, self.caption_key = image_key, label_key, caption_key
        self.shuffle = shuffle
        self.cursor = Cursor()
        self.latest: tuple[int, Raw | CorruptPicture] | None = None  # index and sample

    def __getstate__(self) -> dict[str, Any]:
        # an open shard stays in its process
        return {**self.__dict__, "cursor": Cursor(), "latest": None}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in [0, {len(self)})")
        if self.latest is None or self.latest[0] != index:
            shard = int(np.searchsorted(self.ends, index, side="right"))
            first = index - int(self.ends[shard]) + self.counts[shard]
            self.latest = (index, self.read(shard, first, first + 1, self.cursor)[0])
        raw = self.latest[1]
        if isinstance(raw, CorruptPicture):
            raise raw
        return self.item(raw)

    def read(self, shard: int, first: int, last: int, cursor: Cursor) -> list[Raw | CorruptPicture]:
        """Samples first to last - 1 of a shard, undecoded, moving the cursor; those that it lacks
        are one and the same CorruptPicture."""
        if (cursor.shard, cursor.process) != (shard, os.getpid()) or cursor.next > first:
            cursor.shard, cursor.next, cursor.damage = shard, 0, None
            cursor.samples = stream_samples(self.shards[shard], self.fetch)
            cursor.process = os.getpid()
        found: list[Raw | CorruptPicture] = []
        while cursor.damage is None and cursor.next < last:
            try:
                raw = next(cursor.samples)
            except StopIteration:
                cursor.damage = self.damage(cursor, "it ends")
            except SHARD_ERRORS as error:
                cursor.damage = self.damage(cursor, str(error) or type(error).__name__)
            else:
                if cursor.next >= first:
                    found.append(raw)
                cursor.next += 1
        return found + [cursor.damage] * (last - first - len(found))  # type: ignore[list-item]

    def damage(self, cursor: Cursor, reason: str) -> CorruptPicture:
        stated = self.counts[cursor.shard]
        return CorruptPicture(
            self.shards[cursor.shard], f"damaged after {cursor.next} of {stated} samples: {reason}"
        )

    def item(self, raw: Raw) -> dict[str, Any]:
        """Decode a sample. Raises CorruptPicture."""
        image = next((k for k in self.image_key.split(";") if k in raw.members), None)
        if image is None:
            raise CorruptPicture(raw.name, "the sample holds no picture")
        label: int | str | None = UNLABELLED
        if self.label_key is not None:
            label = find_label(raw.members, self.label_key, raw.name)
        index = None if label is None else find_class(self.table, label)
        if index is None:
            raise CorruptPicture(raw.name, f"label {label!r} is none of the class_names")
        captions = find_captions(raw.members, self.caption_key, raw.name)
        return {
            "image": load_picture(raw.members[image], raw.name),
            "label": index,
            **captioned(captions, self.class_names[index]),
            "key": raw.name,
        }

    def state(self) -> Iterator[str]:
        for shard, count in zip(self.shards, self.counts, strict=True):
            yield f"{shard} {count} {state_of(shard)}"
