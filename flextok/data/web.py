"""WebDataset shards (tar) as data sets, read at random: local ones, and any that are fetched to a
cache first. What is damaged is counted, named and left out; it never stops a run."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Thread
from typing import Any, TypeVar

import numpy as np

from flextok.data import labels
from flextok.data.openers import is_remote, parse_fetch
from flextok.data.pictures import EXTENSIONS, UNLABELLED, CorruptPicture, load_picture, read_text
from flextok.data.shard_cache import ShardCache
from flextok.data.shards import (
    TOO_MANY,
    Table,
    expand_shards,
    read_index,
    read_table,
    state_of,
    stated_counts,
)
from flextok.data.stream import Sharded, SkipCounter
from flextok.schema import find_class

IMAGE_KEY = ";".join(extension[1:] for extension in EXTENSIONS)
HELD = 100_000  # samples whose places a stream holds in memory
T = TypeVar("T")
log = logging.getLogger(__name__)


class Shards(Sharded):
    """The samples of tar shards, in order.

    Keys are alternatives joined by ";", the first that a sample has counts: an extension ("cls") or
    a field of its .json. Labels are class names or, where no class has that name, class numbers.
    """

    class_names: list[str]
    labels: list[int] | None = None  # of each sample, where they are known beforehand
    keys_name_shards = True

    def __init__(
        self, shards: list[str], image_key: str, label_key: str | None, caption_key: str
    ) -> None:
        self.shards, self.label_key, self.caption_key = shards, label_key, caption_key
        self.image_keys = image_key.split(";")
        self.label_keys = {*(label_key or "").split(";"), "json"}
        self.extensions = {*self.image_keys, *self.label_keys, *caption_key.split(";")}
        self.tables: dict[int, Table] = {}

    def describe(self, counts: Sequence[int], class_names: list[str], shuffle: int) -> None:
        """counts: samples of each shard."""
        self.counts, self.ends, self.shuffle = counts, np.cumsum(counts), shuffle
        self.class_names, self.numbers = class_names, labels.label_table(class_names)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index={index} must be in [0, {len(self)})")
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard, count, table = self.shards[number], self.counts[number], self.table(number)
        row = index - int(self.ends[number]) + count
        if row >= (whole := len(table.keys)):
            reason = f"damaged after {whole} of {count} samples: {table.damage or 'it ends'}"
            raise CorruptPicture(shard, reason, count - whole)
        name = f"{shard}: {table.keys[row]}"
        members = table.read(row, self.extensions, name)
        image = next((members[key] for key in self.image_keys if key in members), None)
        if image is None:
            raise CorruptPicture(name, "the sample holds no picture")
        if self.labels is None:
            stated = self.find_label(members, name)
            label = None if stated is None else find_class(self.numbers, stated)
            if label is None:
                raise CorruptPicture(name, f"label {stated!r} is none of the class_names")
        else:
            label = self.labels[index]
        texts = find(members, self.caption_key, name, labels.texts_of, labels.texts_of)
        return {
            "image": load_picture(image, name),
            "label": label,
            **labels.captioned(texts or [], self.class_names[label]),
            "key": name if self.keys_name_shards else table.keys[row],
        }

    def table(self, number: int) -> Table:
        return self.tables[number]

    def find_label(self, members: Mapping[str, bytes], name: str) -> int | str | None:
        """The label as the sample states it. Raises CorruptPicture, naming the sample."""
        if self.label_key is None:
            return UNLABELLED
        return find(members, self.label_key, name, written_label, labels.as_label)


class WebDatasetImages(Shards):
    """Local WebDataset shards, each of which is indexed once, at the start."""

    keys_name_shards = False

    def __init__(
        self,
        urls: str | Sequence[str],
        image_key: str = IMAGE_KEY,
        label_key: str | None = "cls;label",
        caption_key: str = "txt;caption",
        class_names: Sequence[str] | int | None = None,
    ) -> None:
        """urls: paths, with {000..012} or * where there are many. label_key None: one class."""
        super().__init__(expand_shards(urls), image_key, label_key, caption_key)
        if remote := [shard for shard in self.shards if is_remote(shard)]:
            raise ValueError(f"urls={remote[0]!r} is remote: take name webdataset_stream for it")
        found: list[int | str] = []
        self.tables = {n: self._index(shard, found) for n, shard in enumerate(self.shards)}
        if not found:
            raise ValueError(f"urls={urls!r}: no sample can be read; see the warnings above")
        if not any(set(self.image_keys) & set(table.extensions) for table in self.tables.values()):
            raise ValueError(f"image_key={image_key!r} is in no sample of urls={urls!r}")
        names, self.labels = labels.index_labels(found, class_names)
        self.describe([len(table.keys) for table in self.tables.values()], names, len(found))

    def _index(self, shard: str, found: list[int | str]) -> Table:
        """The table of a shard's samples whose labels can be read; their labels go into `found`."""
        skips = SkipCounter()
        table = read_table(shard, self.extensions)
        if table.damage:
            reason = f"{table.damage}; what lies before the damage is used"
            skips.skip(CorruptPicture(f"{shard} is no whole, uncompressed tar", reason))
        kept = []
        for row, key in enumerate(table.keys):
            name = f"{shard}: {key}"
            try:
                label = self.find_label(table.read(row, self.label_keys, name), name)
            except CorruptPicture as error:
                skips.skip(error)
                continue
            if label is None:
                has = next(spans for other, spans in read_index(shard) if other == key)
                raise ValueError(
                    f"label_key={self.label_key!r} is not in {name}, which has "
                    f"{', '.join(has)}; name another or set label_key to null"
                )
            found.append(label)
            kept.append(row)
        return table._replace(keys=[table.keys[row] for row in kept], spans=table.spans[kept])

    @property
    def keys(self) -> list[str]:
        return [key for table in self.tables.values() for key in table.keys]

    def state(self) -> Iterator[str]:
        for shard in self.shards:
            yield f"{placed(shard)} {state_of(shard)}"


class WebDatasetStream(Shards):
    """WebDataset shards, local or remote, as many as there are.

    Its length, hence an epoch's, is stated: by an index file (see `flextok index`), by `samples`
    for each shard, or counted in local shards. A shard is indexed when it is needed. What is remote
    or compressed is fetched to a cache before. A shard that holds fewer samples than stated is
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
        shuffle: int = 10_000,
        fetch: str | Sequence[str] | None = None,
        cache: str | None = None,
        cache_gb: float = 100.0,
    ) -> None:
        """urls: paths and URLs with {000..012}, or an index file (.json). class_names: names, or
        their number where the labels are numbers. shuffle: so many samples of the shuffled shards
        in a row are shuffled at a time; the shards that hold them must fit into the cache together.
        fetch: a command that writes the shard {url} to its standard output, for addresses that are
        not http(s); it is run without a shell. cache: a folder for copies of at most cache_gb
        gigabytes, best on a local disk; by default ~/.cache/flextok/shards."""
        if shuffle < 1:
            raise ValueError(f"shuffle={shuffle} must be at least 1: samples shuffled at a time")
        if label_key is None:
            class_names = [UNLABELLED]
        elif class_names is None:
            raise ValueError(
                "a stream's labels are not known beforehand: give class_names, a list or how many "
                "numbers there are, or label_key=null for data without labels"
            )
        names = labels.check_names(class_names)
        command = parse_fetch(fetch)
        self.cache = ShardCache(cache, cache_gb, command)
        shards, counts = stated_counts(urls, samples, command)
        super().__init__(shards, image_key, label_key, caption_key)
        self.describe(counts, names, shuffle)
        if not len(self):
            raise ValueError(f"urls={urls!r} hold no sample that can be read")
        self.prefetching: Thread | None = None
        self.begun = False  # whether a shard has been read
        self.longer: set[int] = set()  # shards that hold more samples than stated

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": {}, "prefetching": None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        for _ in range(9):
            with contextlib.suppress(FileNotFoundError):
                return super().__getitem__(index)
            self.tables.clear()  # another process made room in the cache
        raise ValueError(f"cache_gb={self.cache.limit / 1e9:g} is too small for so many shards")

    def table(self, number: int) -> Table:
        if number not in self.tables:
            shard = self.shards[number]
            copied = self.cache.holds(shard)
            path = str(self.cache.get(shard, self.counts[number])) if copied else shard
            self.tables[number] = read_table(path, self.extensions)
            if copied and not os.path.exists(path):
                raise FileNotFoundError(path)
            self._check(number, self.tables[number])
            held = sum(len(table.keys) for table in self.tables.values())
            while held > max(HELD, 4 * self.shuffle) and len(self.tables) > 1:
                held -= len(self.tables.pop(next(iter(self.tables))).keys)
        return self.tables[number]

    def _check(self, number: int, table: Table) -> None:
        """Raises ValueError where the first shard that is read has none of the keys that were asked
        for, and warns of samples beyond the stated ones, once."""
        shard, held = self.shards[number], set(table.extensions)
        if table.keys and not self.begun:
            missing = None
            if not held & set(self.image_keys):
                missing = f"image_key={';'.join(self.image_keys)!r}"
            elif self.label_key is not None and not held & self.label_keys:
                missing = f"label_key={self.label_key!r}"
            if missing:
                raise ValueError(f"{missing} is in no sample of {shard}: name another")
        self.begun = True
        if len(table.keys) > self.counts[number] and number not in self.longer:
            self.longer.add(number)
            log.warning(TOO_MANY, shard, self.counts[number])

    def prefetch(self, shards: Sequence[int]) -> None:
        if self.prefetching is None or not self.prefetching.is_alive():
            wanted = [(self.shards[n], self.counts[n]) for n in shards]
            self.prefetching = Thread(target=self.cache.prefetch, args=(wanted,), daemon=True)
            self.prefetching.start()

    def state(self) -> Iterator[str]:
        for shard, count in zip(self.shards, self.counts, strict=True):
            yield f"{placed(shard)} {count} {state_of(shard)}"


def placed(shard: str) -> str:
    """The address of a shard; of a local one the same however its path is written."""
    return shard if is_remote(shard) else os.path.abspath(shard)


def written_label(text: str) -> int | str:
    """The label in a member: a number where it is written as one, 7 and not 007."""
    return int(text) if labels.NUMBER.fullmatch(text) else text


def find(
    members: Mapping[str, bytes],
    keys: str,
    name: str,
    of_member: Callable[[str], T],
    of_field: Callable[[object], T],
) -> T | None:
    """The first of keys that is a member of the sample, by its text, or a field of its .json.
    Raises CorruptPicture, naming the sample, for what cannot be read and where of_field raises
    ValueError."""
    fields: dict[str, object] = {}
    for key in keys.split(";"):
        if key in members:
            return of_member(read_text(members[key], name))
        if "json" in members:
            try:
                fields = fields or json.loads(read_text(members["json"], name))
            except (ValueError, RecursionError) as error:
                raise CorruptPicture(name, f"unreadable .json ({error})") from None
            if not isinstance(fields, dict):
                raise CorruptPicture(name, "its .json is no mapping of fields")
            if fields.get(key) is not None:
                try:
                    return of_field(fields[key])
                except ValueError as error:
                    raise CorruptPicture(name, error) from None
    return None
