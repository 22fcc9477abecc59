"""Copies of shards: each is fetched once, and they make room for each other."""

import gzip
import io
import os
import shutil
import time
from pathlib import Path

import pytest
from helpers.files import write_shard
from PIL import Image
from torch.utils.data import DataLoader

from flextok.data import shard_cache
from flextok.data.shard_cache import ShardCache
from flextok.data.stream import PositionSampler, Stream, collate
from flextok.data.web import WebDatasetStream
from flextok.files import WriteError
from flextok.images import CorruptPicture


def number_of(item, generator):
    return {"number": item["image"].getpixel((0, 0))[0]}


@pytest.fixture
def shards(tmp_path) -> str:
    """Six compressed shards of five samples; sample n's picture has the color (n, 0, 0)."""
    for shard in range(6):
        members = {}
        for n in range(5 * shard, 5 * shard + 5):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (n, 0, 0)).save(buffer, "PNG")
            members[f"{n}.png"] = buffer.getvalue()
        whole = Path(write_shard(tmp_path / "plain.tar", members)).read_bytes()
        (tmp_path / f"{shard}.tar.gz").write_bytes(gzip.compress(whole, 0))
    return f"{tmp_path}/{{0..5}}.tar.gz"


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> Path:
    """A file with a line for each shard that any process has fetched."""
    log, plain = tmp_path / "fetched", shard_cache.stream_samples
    log.touch()

    def noted(shard, fetch):
        with open(log, "a") as file:
            file.write(f"{Path(shard).name}\n")
        return plain(shard, fetch)

    monkeypatch.setattr(shard_cache, "stream_samples", noted)
    return log


def stream(shards, folder, **options) -> WebDatasetStream:
    return WebDatasetStream(
        shards, samples=5, label_key=None, shuffle=4, cache=str(folder), **options
    )


def numbers(data, count, workers=0) -> list[int]:
    stream = Stream(data, number_of, seed=2)
    loader = DataLoader(
        stream,
        batch_sampler=PositionSampler(stream, 3),
        num_workers=workers,
        collate_fn=collate,
    )
    return [n for batch, _ in zip(loader, range(count), strict=False) for n in batch["number"]]


def test_a_shard_is_fetched_once_by_all_processes(shards, tmp_path, fetched):
    one = numbers(stream(shards, tmp_path / "one"), 20)
    assert sorted(fetched.read_text().split()) == [f"{i}.tar.gz" for i in range(6)]
    fetched.write_text("")
    two = numbers(stream(shards, tmp_path / "two"), 20, workers=2)
    assert sorted(fetched.read_text().split()) == [f"{i}.tar.gz" for i in range(6)]
    assert one == two
    assert sorted(one[:30]) == sorted(one[30:]) == list(range(30))
    # a later run finds them, and fetches one that has changed
    fetched.write_text("")
    os.utime(tmp_path / "4.tar.gz", (1, 1))
    assert numbers(stream(shards, tmp_path / "two"), 20) == one
    assert fetched.read_text().split() == ["4.tar.gz"]


def test_the_shards_of_the_next_block_are_fetched_meanwhile(shards, tmp_path):
    data = stream(shards, tmp_path / "cache")
    training = Stream(data, number_of, seed=2)
    training[0]
    data.prefetching.join()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2  # of samples 0 to 7
    training[4]
    data.prefetching.join()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3


def test_copies_make_room_for_each_other(shards, tmp_path, fetched):
    size = 5 * 1024 + 10 * 512  # of a copy
    data = stream(shards, tmp_path / "cache", cache_gb=2.5 * size / 1e9)
    whole = numbers(stream(shards, tmp_path / "other"), 20)
    assert numbers(data, 20) == whole
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 4
    for path in (tmp_path / "cache").glob("*.tar"):  # as another process may
        path.unlink()
    assert numbers(data, 20) == whole
    data.cache.limit = 1.5 * size  # two processes take each other's copies away
    assert numbers(data, 20, workers=2) == whole
    with pytest.raises(ValueError, match="cache_gb=0 must be more than 0"):
        stream(shards, tmp_path / "cache", cache_gb=0)


def test_the_copy_that_was_opened_longest_ago_goes_first(shards, tmp_path):
    names = [f"{tmp_path}/{i}.tar.gz" for i in range(4)]
    cache = ShardCache(str(tmp_path / "cache"), 1, None)
    first, second, third = (cache.get(name, 5) for name in names[:3])
    now = time.time()
    for age, path in ((10, first), (30, second), (20, third)):
        os.utime(path, (now - age, now - age))
    cache.limit = first.stat().st_size * 2.5
    cache.get(names[0], 5)
    fourth = cache.get(names[3], 5)
    assert [p.exists() for p in (first, second, third, fourth)] == [True, False, True, True]


def test_copies_leave_a_tenth_of_a_small_disk(shards, tmp_path, monkeypatch):
    cache = ShardCache(str(tmp_path / "cache"), 100, None)
    first = cache.get(f"{tmp_path}/0.tar.gz", 5)
    assert cache.get(f"{tmp_path}/1.tar.gz", 5).exists()
    os.utime(first, (1, 1))
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert cache.get(f"{tmp_path}/2.tar.gz", 5).exists()
    assert not first.exists()


def test_a_shard_that_was_cut_is_fetched_again_later(shards, tmp_path, monkeypatch, caplog):
    whole = (tmp_path / "0.tar.gz").read_bytes()
    (tmp_path / "0.tar.gz").write_bytes(whole[:3500])
    os.utime(tmp_path / "0.tar.gz", (1, 1))
    data = stream(shards, tmp_path / "cache")
    for again in (data, stream(shards, tmp_path / "cache")):
        with pytest.raises(CorruptPicture, match=r"0\.tar\.gz: damaged after 3 of 5") as raised:
            again[4]
        assert raised.value.samples == 2
    assert caplog.text.count("0.tar.gz is damaged: ") == 1
    monkeypatch.setattr(shard_cache, "RETRY", 0)
    monkeypatch.setattr(shard_cache, "stream_samples", lambda *_: iter(samples()))
    assert number_of(stream(shards, tmp_path / "cache")[4], None) == {"number": 9}


def samples():
    """What the same address gives later."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 0, 0)).save(buffer, "PNG")
    return [(str(i), {"png": buffer.getvalue()}) for i in range(5)]


def test_a_folder_that_cannot_be_written_is_named(shards, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"could not write .*file/cache.*name another folder"):
        ShardCache(str(tmp_path / "file" / "cache"), 1, None).get(f"{tmp_path}/0.tar.gz", 5)


def test_what_a_killed_process_left_is_overwritten(shards, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"), 1, None)
    whole = cache.get(f"{tmp_path}/0.tar.gz", 5)
    content = whole.read_bytes()
    whole.unlink()
    whole.with_suffix(".part").write_bytes(content[:700])
    assert cache.get(f"{tmp_path}/0.tar.gz", 5).read_bytes() == content
    assert not whole.with_suffix(".part").exists()


def test_a_shard_without_end_does_not_fill_the_disk(shards, tmp_path, monkeypatch, caplog):
    def endless(shard, fetch):
        n = 0
        while True:
            yield str(n := n + 1), {"png": bytes(100_000)}

    monkeypatch.setattr(shard_cache, "stream_samples", endless)
    cache = ShardCache(str(tmp_path / "cache"), 0.001, None)
    assert cache.get("https://host/a.tar", 10**9).stat().st_size < 1.3e6
    assert "https://host/a.tar is damaged: it is larger than cache_gb=0.001" in caplog.text
    cache = ShardCache(str(tmp_path / "cache"), 1, None)
    assert cache.get("https://host/a.tar", 3).suffix == ".tar"  # no more than stated
