"""The tar files of WebDataset: their addresses, their number of samples, and what is in them.

Any shard can be read from its beginning to its end (see openers); a plain one on a local disk is
read at random, through the Table of its members.
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
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand

from flextok.data.openers import check_address, check_listed, is_http, is_remote, open_shard
from flextok.data.pictures import CorruptPicture, decode_text
from flextok.data.stream import SkipCounter

MAX_INDEX = 64 << 20  # bytes of an index file: some 600,000 shards
MAX_SAMPLES = 10**9  # that an index may state for one shard
MAX_SAMPLE = 128 << 20  # bytes of a streamed sample, or of a member of a local one
TOO_MANY = "%s holds more than the %d samples that are stated: the others are never read"
MAX_EXTENSION = 32 << 10  # bytes of a long name, or of other facts that precede a member
EXTENDING = (  # types of tar headers whose content is read with the headers
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
Span = tuple[int, int]  # offset and size in the shard
# what a truncated, empty, forged or unreachable shard raises, plain or compressed
SHARD_ERRORS = (
    *(tarfile.TarError, OSError, EOFError, ValueError, http.client.HTTPException),
    *(zlib.error, lzma.LZMAError, OverflowError, RecursionError, MemoryError),
)


def state_of(path: str | Path) -> str:
    """A file's size and time of change, without reading it; an address that is no file gives
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
            f"how many samples {remote[0]} holds is not stated: write an index with `flextok index "
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
            raise ValueError(f"{index} states {count!r} samples for {url}: index it again")
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
    """How many samples of a shard can be read, with a warning where it is damaged."""
    plain = fetch is None and is_plain(shard)
    count = 0
    try:
        for _ in read_index(shard) if plain else stream_samples(shard, fetch):
            count += 1
    except SHARD_ERRORS as error:
        SkipCounter().skip(CorruptPicture(shard, f"damaged after {count} samples: {error}"))
    return count


def is_plain(shard: str) -> bool:
    """Whether a shard is a local file that, by its name, is not compressed."""
    return not is_remote(shard) and shard.endswith(".tar")


def stream_samples(
    url: str, fetch: list[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, extension -> content) of the samples of a shard in order. Raises one of SHARD_ERRORS
    where it is damaged; the sample in which that happens is left out."""
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
            yield key, members


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
    for url in [urls] if isinstance(urls, str) else urls:
        if not isinstance(url, str):
            raise ValueError(f"urls holds {url!r}, which is no path or address")
        try:
            # unlike Path's, isfile takes an address of any length
            several = [url] if os.path.isfile(os.path.expanduser(url)) else [*braceexpand(url)]
        except ValueError as error:  # unbalanced braces
            raise ValueError(f"urls={url!r}: {error}") from None
        for one in several:
            path = os.path.expanduser(one)
            if os.path.isfile(path):
                shards.append(path)
            elif is_remote(check_address(one, fetch)):
                shards.append(one)
            elif found := [file for file in sorted(glob.glob(path)) if os.path.isfile(file)]:
                shards += found
            else:
                raise ValueError(f"urls={one!r} matches no file")
    if not shards:
        raise ValueError(f"urls={urls!r} names no shard")
    return shards


def read_index(shard: str) -> Iterator[tuple[str, dict[str, Span]]]:
    """(key, extension -> span) of each sample: consecutive members with one name up to the dot.
    Raises TarError where the shard is damaged, leaving out the sample in which that happens."""
    with tarfile.open(shard, "r:", tarinfo=Header) as tar:
        for key, group in itertools.groupby(files(tar), key=lambda file: file[0]):
            yield key, {extension: (h.offset_data, h.size) for _, extension, h in group}


class Table(NamedTuple):
    """Where the members of a local shard's samples lie. Arrays, not objects: a table of millions is
    shared between workers without copies."""

    path: str
    keys: list[str]  # of the samples
    extensions: list[str]
    spans: np.ndarray  # (samples, extensions, 2): offset and size; a size of -1 for no such member
    damage: str  # what ended the shard before its end, if anything did

    def read(self, row: int, extensions: Collection[str], name: str) -> dict[str, bytes]:
        """The members of a sample with these extensions. The file is opened anew for each sample:
        nothing to share between, or to send to, worker processes. Raises CorruptPicture for a
        member that is too large."""
        members = {}
        with open(self.path, "rb") as file:
            for extension, span in zip(self.extensions, self.spans[row], strict=True):
                offset, size = span.tolist()
                if size > MAX_SAMPLE and extension in extensions:
                    reason = f"a member of {size} bytes is larger than {MAX_SAMPLE}"
                    raise CorruptPicture(name, reason)
                if size >= 0 and extension in extensions:
                    file.seek(offset)
                    members[extension] = file.read(size)
        return members


def read_table(path: str, extensions: Collection[str]) -> Table:
    """The table of a plain local shard, of members with these extensions. Of a damaged one, what
    lies before the damage."""
    keys, found, damage = [], [], ""
    extensions = sorted(extensions)
    try:
        for key, members in read_index(path):
            keys.append(key)
            found.append([members.get(extension, (0, -1)) for extension in extensions])
    except SHARD_ERRORS as error:
        damage = str(error) or type(error).__name__
    spans = np.array(found, dtype=np.int64).reshape(len(keys), len(extensions), 2)
    held = np.flatnonzero((spans[:, :, 1] >= 0).any(0))
    return Table(path, keys, [extensions[i] for i in held], spans[:, held], damage)
