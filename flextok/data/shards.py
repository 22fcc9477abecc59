"""The tar files of WebDataset: their addresses, their number of samples, and what is in them.

Any shard can be read from its beginning to its end (see openers), a local one also at random, by
member offset.
"""

import glob
import http.client
import itertools
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.shardlists import expand_urls

from flextok.data.labels import NUMBER, as_label, texts_of
from flextok.data.openers import check_address, check_listed, is_http, is_remote, open_shard
from flextok.data.pictures import CorruptPicture, decode_text, read_text
from flextok.data.stream import SkipCounter

MAX_INDEX = 64 << 20  # bytes of an index file: some 600,000 shards
MAX_SAMPLES = 10**9  # that an index may state for one shard
MAX_SAMPLE = 128 << 20  # bytes of a streamed sample, or of a local one's member
MAX_EXTENSION = 32 << 10  # bytes of a long name, or of other facts that precede a member
EXTENDING = (  # types of tar headers whose content is read with the headers
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
Members = Mapping[str, bytes]  # extension, lower case -> content
Span = tuple[int, int]  # offset and size in the shard
# what a truncated, empty, forged or unreachable shard raises, plain or compressed
SHARD_ERRORS = (
    *(tarfile.TarError, OSError, EOFError, ValueError, http.client.HTTPException),
    *(zlib.error, lzma.LZMAError, OverflowError, RecursionError, MemoryError),
)


@dataclass
class Raw:
    """An undecoded sample of a stream."""

    name: str  # shard and key
    members: Members


def state_of(path: str | Path) -> str:
    """A file's size and time of change, without reading it; an address that is no file's says
    nothing."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return "-"
    return f"{facts.st_size} {facts.st_mtime_ns}"


def stated_counts(
    urls: str | Sequence[str], samples: int | None, fetch: list[str] | None = None
) -> tuple[list[str], list[int]]:
    """Shards and how many samples each holds. A local shard that cannot be read holds as many as
    can be."""
    if isinstance(urls, str) and urls.endswith(".json"):
        return read_listed(check_address(urls, fetch), fetch)
    shards = expand_shards(urls, fetch)
    if samples is not None:
        if samples < 1:
            raise ValueError(f"samples={samples} must be at least 1, what each shard holds")
        return shards, [samples] * len(shards)
    if remote := [shard for shard in shards if is_remote(shard)]:
        raise ValueError(
            f"nobody says how many samples {remote[0]} holds: write an index with `flextok index "
            "<urls> <index.json>` and give that as urls, or set samples, if all hold as many"
        )
    return shards, [count_samples(shard, fetch) for shard in shards]


def read_listed(index: str, fetch: list[str] | None) -> tuple[list[str], list[int]]:
    """The shards that an index file lists, and their numbers of samples."""
    place = index if is_remote(index) else os.path.expanduser(index)
    by = fetch if is_remote(index) and not is_http(index) else None
    try:
        with open_shard(place, by) as file:
            content = file.read(MAX_INDEX + 1)
        if len(content) > MAX_INDEX:
            raise ValueError(f"it is larger than {MAX_INDEX >> 20} MB")
        listed = json.loads(decode_text(content))["shardlist"]
        found = [(entry["url"], entry["nsamples"]) for entry in listed]
    except (*SHARD_ERRORS, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is no readable index of shards: {error!r}") from None
    shards, counts = [], []
    for url, count in found:
        shards.append(check_listed(index, url, fetch))
        if type(count) is not int or not 0 <= count < MAX_SAMPLES:
            raise ValueError(f"{index} says that {url} holds {count!r} samples: index it again")
        counts.append(count)
    if not shards:
        raise ValueError(f"{index} lists no shard: write it with `flextok index`")
    return shards, counts


def write_index(urls: str | Sequence[str], fetch: list[str] | None = None) -> dict[str, Any]:
    """The content of an index file: every shard, read whole, with its number of samples."""
    shards = [str(Path(s).resolve()) if not is_remote(s) else s for s in expand_shards(urls, fetch)]
    counts = [{"url": shard, "nsamples": count_samples(shard, fetch)} for shard in shards]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": counts}


def count_samples(shard: str, fetch: list[str] | None = None) -> int:
    count = 0
    plain = fetch is None and not is_remote(shard) and shard.endswith(".tar")
    samples = read_index(shard) if plain else stream_samples(shard, fetch)
    skips = SkipCounter()
    try:
        for count, _ in enumerate(samples, start=1):  # noqa: B007
            pass
    except SHARD_ERRORS as error:
        skips.skip(CorruptPicture(shard, f"damaged after {count} samples: {error}"))
    return count


def stream_samples(url: str, fetch: list[str] | None = None) -> Iterator[Raw]:
    """The samples of a shard in order. Raises one of SHARD_ERRORS where it is damaged; the sample
    in which that happens is left out."""
    with (
        open_shard(url, fetch) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header) as tar,
    ):
        for key, group in itertools.groupby(files(tar), key=lambda file: file[0]):
            members: dict[str, bytes] = {}
            size = 0
            for _, extension, header in group:
                if (size := size + header.size) > MAX_SAMPLE:
                    raise tarfile.ReadError(
                        f"{header.name} makes a sample of {size} bytes, more than {MAX_SAMPLE}"
                    )
                content = tar.extractfile(header)
                assert content is not None, "it is a regular file"
                members[extension] = content.read()
            yield Raw(f"{url}: {key}", members)


class Header(tarfile.TarInfo):
    """A member's header, with its size checked before anything is read by it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        most = MAX_EXTENSION if header.type in EXTENDING else 2**48
        if not 0 <= header.size <= most:
            raise tarfile.ReadError(f"{header.name!r} states a size of {header.size} bytes")
        return header


def files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, header) of the files of samples: a name is the key up to its first dot."""
    for header in tar:
        tar.members = []  # type: ignore[attr-defined]  # they would be kept to the end
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", header.name)
        if header.issparse() or header.size < 0:
            raise tarfile.ReadError(f"{header.name!r} has holes, or no size: make it a plain file")
        if header.isfile() and match is not None and not header.name.startswith("__"):  # metadata
            yield match[1], match[2].lower(), header


def expand_shards(urls: str | Sequence[str], fetch: list[str] | None = None) -> list[str]:
    """Braces and globs to local files and URLs, in order. A file of that very name goes first."""
    shards: list[str] = []
    for url in expand_braces([urls] if isinstance(urls, str) else urls):
        path = os.path.expanduser(url)
        is_file = os.path.isfile(path)  # unlike Path's, it takes an address of any length
        if not is_file and is_remote(check_address(url, fetch)):
            shards.append(url)
            continue
        found = [path] if is_file else [f for f in sorted(glob.glob(path)) if os.path.isfile(f)]
        if not found:
            raise ValueError(f"urls={url!r} matches no file")
        shards += found
    if not shards:
        raise ValueError(f"urls={urls!r} names no shard")
    return shards


def expand_braces(urls: Sequence[str]) -> Iterator[str]:
    for url in urls:
        if not isinstance(url, str):
            raise ValueError(f"urls holds {url!r}, which is no path or address")
        try:
            yield from [url] if os.path.isfile(os.path.expanduser(url)) else expand_urls(url)
        except ValueError as error:  # unbalanced braces
            raise ValueError(f"urls={url!r}: {error}") from None


def read_index(shard: str) -> Iterator[tuple[str, dict[str, Span]]]:
    """(key, extension -> span) of each sample: consecutive members with one name up to the dot.
    Raises TarError where the shard is damaged, leaving out the sample in which that happens."""
    with tarfile.open(shard, "r:", tarinfo=Header) as tar:
        for key, group in itertools.groupby(files(tar), key=lambda file: file[0]):
            yield key, {extension: (h.offset_data, h.size) for _, extension, h in group}


def whole_samples(shard: str, skips: SkipCounter) -> Iterator[tuple[str, dict[str, Span]]]:
    """What read_index gives of a shard before it is damaged, if it is."""
    try:
        yield from read_index(shard)
    except SHARD_ERRORS as error:
        reason = f"{error}; what lies before the damage is used"
        skips.skip(CorruptPicture(f"{shard} is no whole, uncompressed tar", reason))


def read_member(shard: str, span: Span) -> bytes:
    """Opened anew for each read: nothing to share between, or to send to, worker processes. Raises
    CorruptPicture for a member that is too large."""
    if span[1] > MAX_SAMPLE:
        raise CorruptPicture(shard, f"a member of {span[1]} bytes is larger than {MAX_SAMPLE}")
    with open(shard, "rb") as file:
        file.seek(span[0])
        return file.read(span[1])


class LocalMembers(Mapping[str, bytes]):
    """The members of a local shard's sample, each read when it is asked for."""

    def __init__(self, shard: str, spans: Mapping[str, Span]):
        self.shard, self.spans = shard, spans

    def __getitem__(self, extension: str) -> bytes:
        return read_member(self.shard, self.spans[extension])

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)


def find_label(members: Members, keys: str, name: str) -> int | str | None:
    """A sample's label by the first of keys that it has. A number in a member is one where it is
    written as such: 7 and not 007. Raises CorruptPicture, naming the sample."""
    value, is_member = find(members, keys, name)
    if is_member:
        return int(str(value)) if NUMBER.fullmatch(str(value)) else str(value)
    try:
        return None if value is None else as_label(value)
    except ValueError as error:
        raise CorruptPicture(name, error) from None


def find_captions(members: Members, keys: str, name: str) -> list[str]:
    """A sample's captions, likewise; text stays text."""
    try:
        return texts_of(find(members, keys, name)[0])
    except ValueError as error:
        raise CorruptPicture(name, error) from None


def find(members: Members, keys: str, name: str) -> tuple[object, bool]:
    """The first of keys that is a member of the sample, as text, or a field of its .json, as it
    stands there; and whether it is a member. Raises CorruptPicture, naming the sample, when its
    .json cannot be read."""
    fields: dict[str, object] = {}
    for key in keys.split(";"):
        if key in members:
            return read_text(members[key], name), True
        if "json" in members:
            try:
                fields = fields or json.loads(read_text(members["json"], name))
            except (ValueError, RecursionError) as error:
                raise CorruptPicture(name, f"unreadable .json ({error})") from None
            if not isinstance(fields, dict):
                raise CorruptPicture(name, "its .json is no mapping of fields")
            if fields.get(key) is not None:
                return fields[key], False
    return None, False
