"""Shards that somebody forged: their sizes are checked before anything is read by them."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc

import pytest
from helpers.files import write_shard
from PIL import Image

from flextok.data.datasets import WebDatasetImages
from flextok.data.shards import SHARD_ERRORS, count_samples, stated_counts, stream_samples
from flextok.data.web import WebDatasetStream
from flextok.images import CorruptPicture

GIGABYTES = 8 * 2**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Of fetched shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def header(name: str, size: int, **facts) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in facts.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def sealed(block: bytes) -> bytes:
    """A tar header with its checksum."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def sample(key: str) -> bytes:
    """A picture and its class, as members."""
    return header(f"{key}.cls", 1) + padded(b"0") + header(f"{key}.png", len(png())) + padded(png())


def sparse() -> bytes:
    """A member of 8 GB of which 512 bytes are stored (GNU's old format)."""
    block = bytearray(header("1.png", 512, type=tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"00000000000\0" + b"00000001000\0"
    block[483:495] = b"%011o\0" % (GIGABYTES - 1)
    return sealed(bytes(block)) + bytes(512)


def negative() -> bytes:
    block = bytearray(header("1.png", 0))
    block[124:136] = b"\xff" * 10 + b"\xfc\x00"  # -1024, which leads back to this header
    return sealed(bytes(block))


def pax(facts: bytes) -> bytes:
    return header("x", len(facts), type=tarfile.XHDTYPE) + padded(facts)


FORGED = {
    "sparse": sparse(),
    "negative": negative(),
    "negative by extension": pax(b"14 size=-1536\n") + header("1.png", 0),
    "endless name": header("x", GIGABYTES, type=tarfile.GNUTYPE_LONGNAME),
    "endless extension": header("x", GIGABYTES, type=tarfile.XHDTYPE),
    "slow extension": pax(b"9" * 400_000) + header("1.png", 0),
    "many extensions": pax(b"12 path=a.b\n") * 3000,
    "astronomical": header("1.png", 2**60),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_sizes_end_a_shard_before_they_are_read(tmp_path, kind):
    """What lies before is used, but for the sample that they end."""
    path = tmp_path / "a.tar"
    path.write_bytes(sample("0") + sample("1") + FORGED[kind] + sample("2"))
    tracemalloc.start()
    with pytest.raises(SHARD_ERRORS):  # noqa: PT012
        for _, members in stream_samples(str(path)):
            assert members["cls"] == b"0"
            assert members["png"] == png()
    dataset = WebDatasetImages(str(path))
    assert [dataset[i]["key"] for i in range(len(dataset))] == ["0"]
    assert count_samples(str(path)) == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_a_member_of_gigabytes_is_not_read(tmp_path):
    """A file of a few kB, the rest of it a hole."""
    path = tmp_path / "a.tar"
    before = sample("0") + header("1.cls", 1) + padded(b"0")
    path.write_bytes(before + header("1.png", GIGABYTES))
    os.truncate(path, len(before) + 512 + GIGABYTES)
    with open(path, "ab") as file:
        file.write(sample("2") + bytes(1024))
    dataset = WebDatasetImages(str(path))
    assert dataset.keys == ["0", "1", "2"]
    with pytest.raises(CorruptPicture, match=f"a member of {GIGABYTES} bytes is larger than"):
        dataset[1]
    assert dataset[2]["image"].size == (8, 6)
    stream = WebDatasetStream(str(path), samples=3, class_names=1)
    assert [stream[i]["image"].size for i in (0, 2)] == [(8, 6), (8, 6)]
    with pytest.raises(CorruptPicture, match=f"a member of {GIGABYTES} bytes is larger than"):
        stream[1]
    with pytest.raises(SHARD_ERRORS, match=rf"1\.png .*{GIGABYTES + 1}"):  # noqa: PT012
        for key, _ in stream_samples(str(path)):
            assert key == "0"


@pytest.mark.parametrize("key", ["cls", "json"])
def test_a_label_of_gigabytes_is_not_read(tmp_path, key):
    path = tmp_path / "a.tar"
    path.write_bytes(sample("0") + header(f"1.{key}", GIGABYTES))
    os.truncate(path, path.stat().st_size + GIGABYTES)
    assert WebDatasetImages(str(path)).keys == ["0"]


def test_a_compressed_shard_that_grows_without_end(tmp_path):
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(sample("0") + header("1.png", GIGABYTES))
        for _ in range(160):
            file.write(bytes(2**20))
    tracemalloc.start()
    assert count_samples(str(path)) == 1
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("content", ["", "{}", '{"shardlist": []}', "[" * 10_000])
def test_an_index_that_lists_nothing_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json (is no readable index|lists no shard)"):
        stated_counts(str(tmp_path / "a.json"), None)


def test_an_index_of_gigabytes_is_not_read(tmp_path):
    (tmp_path / "a.json").touch()
    os.truncate(tmp_path / "a.json", GIGABYTES)
    with pytest.raises(ValueError, match=r"a\.json .*larger than 64 MB"):
        stated_counts(str(tmp_path / "a.json"), None)


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path):
    listed = {"shardlist": [{"url": "a.tar", "nsamples": 3}]}
    (tmp_path / "a.json").write_text(json.dumps(listed), encoding="utf-8-sig")
    assert stated_counts(str(tmp_path / "a.json"), None)[1] == [3]


def test_pictures_of_every_format_are_found_in_a_shard(tmp_path):
    """image_key listed four endings: a sample with another one held no picture."""
    names = ("jpg", "jfif", "gif", "tif", "avif", "JP2")
    members = {f"{i}.{name}": png() for i, name in enumerate(names)}  # read by their content
    shard = write_shard(tmp_path / "a.tar", members)
    dataset = WebDatasetImages(shard, label_key=None)
    stream = WebDatasetStream(shard, label_key=None)
    for index in range(len(names)):
        assert dataset[index]["image"].getpixel((0, 0)) == (255, 0, 0)
        assert stream[index]["image"].getpixel((0, 0)) == (255, 0, 0)
