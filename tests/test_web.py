"""Shards as streams: every sample once an epoch, exact continuation, and no damage stops a run."""

import functools
import gzip
import http.server
import io
import json
import logging
import resource
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import write_shard
from helpers.models import tiny_tokenizer
from helpers.runs import Stop, interrupt_after, logged_losses, tokenizer_yaml, weights
from PIL import Image
from torch.utils.data import DataLoader

from flextok.cli import main
from flextok.config import load_experiment
from flextok.data.augmentation import Augmentation
from flextok.data.datasets import ImageFolder
from flextok.data.pictures import CorruptPicture, load_picture
from flextok.data.stream import EvaluationSet, PositionSampler, Stream, collate
from flextok.data.tokens import TokenDataset, build_token_cache, cache_identity
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetImages, WebDatasetStream
from flextok.training.run import train

SIZES = (7, 12, 5, 9)  # of the shards: 33 samples


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Of fetched shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(color=(255, 0, 0), size=(8, 8), form="PNG", mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
    """Four shards; sample n's picture has the color (n, 0, 0)."""
    number = 0
    for shard, size in enumerate(SIZES):
        members = {}
        for _ in range(size):
            members[f"{number:03d}.png"] = encoded((number, 0, 0))
            members[f"{number:03d}.json"] = json.dumps({"label": number % 3}).encode()
            members[f"{number:03d}.txt"] = f"number {number}".encode()
            number += 1
        write_shard(tmp_path / f"{shard}.tar", members)
    return tmp_path


def dataset(folder, **options) -> WebDatasetStream:
    return WebDatasetStream(str(folder / "*.tar"), **{"class_names": 3, "shuffle": 4, **options})


def number_of(item, generator):
    return {"number": int(np.asarray(item["image"])[0, 0, 0]), "label": item["label"]}


def epochs(folder, count=1, batch=1, ranks=1, workers=0, start=0, **options) -> list[list[int]]:
    """The batches of all processes, in order, until the end of `count` epochs."""
    data = dataset(folder, **options)
    found = []
    for rank in range(ranks):
        stream = Stream(data, number_of, seed=5)
        loader = DataLoader(
            stream,
            batch_sampler=PositionSampler(stream, batch, start * batch * ranks, rank, ranks),
            num_workers=workers,
            collate_fn=collate,
        )
        total = count * len(data) // (batch * ranks) - start
        found.append([b["number"].tolist() for b, _ in zip(loader, range(total), strict=False)])
    return [batch for step in zip(*found, strict=True) for batch in step]


def test_a_stream_is_also_a_data_set(shards):
    stream = dataset(shards)
    assert len(stream) == sum(SIZES)
    for index in (0, 1, 1, 18, 19, 32, 7):
        item = stream[index]
        assert number_of(item, None) == {"number": index, "label": index % 3}
        assert item["caption"] == f"number {index}"
    with pytest.raises(IndexError):
        stream[33]
    everything = DataLoader(EvaluationSet(stream, number_of), batch_size=4, num_workers=2)
    assert torch.cat([batch["number"] for batch in everything]).tolist() == list(range(33))


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(shards):
    first, second = (np.array(epochs(shards, 2)).reshape(2, 33)).tolist()
    assert sorted(first) == sorted(second) == list(range(33))
    assert first != second
    assert first == np.array(epochs(shards, 1)).ravel().tolist()
    # a shard is read from one block to the next, and shuffled
    ends = np.cumsum(SIZES)
    for shard, size in enumerate(SIZES):
        places = [i for i, n in enumerate(first) if ends[shard] - size <= n < ends[shard]]
        assert max(places) - min(places) < size + 2 * 4
        assert [first[i] for i in places] != sorted(first[i] for i in places)
    # larger blocks mix the shards
    mixed = epochs(shards, 1, shuffle=33)
    assert sorted(n for (n,) in mixed) == list(range(33))
    assert {n // 11 for (n,) in mixed[:11]} == {0, 1, 2}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 0), (4, 2), (17, 0)])
def test_the_order_does_not_depend_on_the_readers(shards, ranks, workers):
    """More readers than shards too: none starves, and all processes end together."""
    whole = [n for (n,) in epochs(shards, 2)]
    found = [n for batch in epochs(shards, 2, 1, ranks, workers) for n in batch]
    assert found == whole[: len(found)]
    assert len(found) > 66 - ranks


def test_a_continued_stream_is_the_one_never_stopped(shards):
    for ranks, workers in ((1, 0), (1, 2), (2, 0)):
        whole = epochs(shards, 3, 2, ranks, workers)
        for start in (1, 7, len(whole) // ranks - 2):
            assert epochs(shards, 3, 2, ranks, workers, start) == whole[start * ranks :]


def test_continuing_with_other_readers_repeats_nothing(shards):
    """It repeated as many samples of the epoch as had been seen."""
    seen = [n for batch in epochs(shards, 1, 3)[:4] for n in batch]
    for batch, ranks, workers, start in ((3, 2, 1, 2), (1, 12, 0, 1), (2, 1, 2, 6)):
        rest = epochs(shards, 1, batch, ranks, workers, start)
        found = [*seen, *(n for batch in rest for n in batch)]
        assert len(set(found)) == len(found) > 33 - batch * ranks


# --- damage ---------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG that says it is 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    head = b"\x89PNG\r\n\x1a\n"
    return head + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animated(form: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def rotated() -> bytes:
    image = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    return buffer.getvalue()


def deep() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


HARD = {  # readable ones
    "cmyk.jpg": encoded(form="JPEG", mode="CMYK", quality=95),
    "deep.png": deep(),
    "palette.png": encoded(mode="P"),
    "gif.gif": animated("GIF"),
    "webp.webp": animated("WEBP"),
    "apng.png": animated("PNG"),
    "rotated.jpg": rotated(),
    "misnamed.jpg": encoded(form="PNG"),
}
HOPELESS = {"bomb.png": bomb(), "text.jpg": b"no picture", "nothing.png": b""}


def check(name: str, image: Image.Image) -> None:
    assert image.mode == "RGB"
    expected = (128, 128, 128) if name.startswith("deep") else (255, 0, 0)
    assert np.abs(np.subtract(image.getpixel((2, 2)), expected)).max() <= 6
    assert image.size == ((8, 16) if name.startswith("rotated") else (8, 8))


def hostile_files(folder: Path) -> Path:
    for name, data in (HARD | HOPELESS).items():
        (folder / name).write_bytes(data)
    (folder / "gif.txt").write_bytes("ein h\xe4sslicher Frosch".encode("latin-1"))
    return folder


def hostile_shards(folder: Path, extra: int = 6) -> Path:
    """All of it in a shard, one that is cut in the middle, an empty one, and a sound one."""
    members = {}
    for name, data in (HARD | HOPELESS).items():
        members[name] = data
        members[f"{name.split('.')[0]}.txt"] = "h\xe4sslich".encode("latin-1")
    write_shard(folder / "a.tar", members)
    sound = {f"{i}.png": encoded((255, 0, 0)) for i in range(extra)}
    write_shard(folder / "b.tar", {f"b{name}": data for name, data in sound.items()})
    whole = (folder / "b.tar").read_bytes()
    (folder / "b.tar").write_bytes(whole[: 3 * 1024 + 600])  # three samples and a bit
    (folder / "c.tar").write_bytes(b"")
    write_shard(folder / "d.tar", {f"d{name}": data for name, data in sound.items()})
    return folder


def test_hostile_pictures_in_a_folder(tmp_path, caplog):
    data = EvaluationSet(ImageFolder(hostile_files(tmp_path)), lambda item, _: item)
    items = [data[index] for index in range(len(data))]
    found = {item["key"]: item for item in items if item is not None}
    assert set(found) == set(HARD)
    assert data.skips.count.value == len(HOPELESS)
    assert all(f"{name}: " in caplog.text for name in HOPELESS)  # named, with the reason
    for name, item in found.items():
        check(name, item["image"])
    assert found["gif.gif"]["caption"] == "ein h\ufffdsslicher Frosch"
    assert "not UTF-8" in caplog.text
    assert "gif.txt" in caplog.text


def test_a_bomb_is_told_before_it_goes_off():
    """7.5 GB of pixels: refused by its header, in a few MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptPicture, match=r"huge: .*2500000000 pixels.*bomb"):
        load_picture(bomb(), "huge")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


@pytest.mark.parametrize("kind", [WebDatasetImages, WebDatasetStream])
def test_hostile_shards_do_not_stop_a_run(tmp_path, caplog, kind):
    hostile_shards(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = kind(str(tmp_path / "*.tar"), label_key=None, image_key="jpg;png;gif;webp")
        evaluation = EvaluationSet(data, lambda item, _: item)
        items = [evaluation[index] for index in range(len(data))]
    found = {item["key"].split(": ")[-1]: item for item in items if item is not None}
    readable = {name.split(".")[0] for name in HARD}
    assert readable <= found.keys()
    for name in readable:
        check(name, found[name]["image"])
    assert sum(key.startswith("d") and key[1].isdigit() for key in found) == 6
    assert sum(key.startswith("b") and key[1].isdigit() for key in found) in (2, 3)
    for named in ("b.tar", "c.tar", "bomb", "text", "nothing", "not UTF-8"):
        assert named in caplog.text, named


def test_hostile_shards_train_and_are_counted(tmp_path, caplog):
    hostile_shards(tmp_path)
    listed = [("a", 11), ("b", 6), ("c", 4), ("d", 6)]
    index = {"shardlist": [{"url": str(tmp_path / f"{n}.tar"), "nsamples": k} for n, k in listed]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    data = WebDatasetStream(
        str(tmp_path / "index.json"), label_key=None, image_key="jpg;png;gif;webp", shuffle=3
    )
    stream = Stream(data, ImageTransform(8).prepare)
    assert len(data) == 27
    with caplog.at_level(logging.WARNING):
        batches = [stream[position]["image"] for position in range(27)]
    assert all(image.isfinite().all() for image in batches)
    # 3 hopeless pictures, 3 samples of b, 4 of c
    assert stream.skips.count.value == 3 + 3 + 4
    assert "b.tar: damaged after 3 of 6 samples" in caplog.text
    assert "c.tar: damaged after 0 of 4 samples" in caplog.text
    again = Stream(data, ImageTransform(8).prepare)
    assert all(torch.equal(again[p]["image"], batches[p]) for p in (26, 0, 13))


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "c.tar").write_bytes(b"")
    data = WebDatasetStream(str(tmp_path / "c.tar"), samples=5, label_key=None)
    with pytest.raises(ValueError, match="none of the 5 samples can be read"):
        Stream(data, number_of)[0]
    with pytest.raises(ValueError, match="hold no sample"):
        WebDatasetStream(str(tmp_path / "c.tar"), label_key=None)


def test_hostile_data_can_be_tokenized(tmp_path):
    (tmp_path / "data").mkdir()
    hostile_shards(tmp_path / "data")
    data = WebDatasetStream(
        str(tmp_path / "data" / "*.tar"), label_key=None, image_key="jpg;png;gif;webp"
    )
    tokenizer, transform = tiny_tokenizer(), ImageTransform(16, Augmentation(flip=True))
    options = {"variants": 2, "part_size": 8, "batch_size": 4}
    identity = cache_identity(tokenizer, {})
    for name, workers in (("one", 0), ("two", 2)):
        build_token_cache(
            tmp_path / name, tokenizer, data, transform, identity, num_workers=workers, **options
        )
    one, two = TokenDataset(tmp_path / "one"), TokenDataset(tmp_path / "two")
    assert len(one) >= 2 * (len(HARD) + 6 + 2)
    for part in range(one.store.num_parts):
        assert one.store.path(part).read_bytes() == two.store.path(part).read_bytes()
    assert len(one.store.verify()) >= 3


# --- labels, addresses, mistakes ------------------------------------------------------------------


def test_labels_of_a_stream(tmp_path, caplog):
    fields = [{"label": "tree"}, {"label": 0}, {"label": "house"}, {}]
    members = {}
    for i, record in enumerate(fields):
        members[f"{i}.png"] = encoded()
        members[f"{i}.json"] = json.dumps(record).encode()
    members["4.png"], members["4.json"] = encoded(), b"{no json"
    write_shard(tmp_path / "a.tar", members)
    data = WebDatasetStream(str(tmp_path / "a.tar"), class_names=["car", "tree"])
    assert [data[0]["label"], data[1]["label"]] == [1, 0]
    for index, reason in ((2, "label 'house'"), (3, "label None"), (4, r"unreadable \.json")):
        with pytest.raises(CorruptPicture, match=reason):
            data[index]
    with pytest.raises(ValueError, match="give class_names"):
        WebDatasetStream(str(tmp_path / "a.tar"))


@pytest.fixture
def server(shards):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_shards_over_http_are_indexed_and_streamed(shards, server, tmp_path, capsys):
    index = tmp_path / "index.json"
    urls = f"{server}/{{0..3}}.tar"
    with pytest.raises(ValueError, match="write an index with `flextok index"):
        WebDatasetStream(urls, class_names=3)
    assert main(["index", urls, str(index)]) == 0
    assert "33 samples in 4 shards" in capsys.readouterr().out
    remote = WebDatasetStream(str(index), class_names=3, shuffle=4)
    stream, local = Stream(remote, number_of), Stream(dataset(shards), number_of)
    assert [stream[p] for p in range(70)] == [local[p] for p in range(70)]
    # a shard that is gone
    (shards / "2.tar").rename(shards / "2.gone")
    again = WebDatasetStream(str(index), class_names=3, shuffle=4, cache=str(tmp_path / "other"))
    assert again[3]["label"] == 0
    for number in range(19, 24):
        with pytest.raises(CorruptPicture, match=r"2\.tar: damaged after 0 of 5"):
            again[number]


def test_mistakes(shards):
    with pytest.raises(ValueError, match="shuffle=0"):
        dataset(shards, shuffle=0)
    with pytest.raises(ValueError, match="samples=0"):
        dataset(shards, samples=0)
    (shards / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="no readable index of shards"):
        WebDatasetStream(str(shards / "index.json"), class_names=3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_streams_continues_to_the_last_bit(
    shards, tmp_path_factory, monkeypatch, workers
):
    place = tmp_path_factory.mktemp("runs")
    stream = f"{{name: webdataset_stream, urls: '{shards}/*.tar', class_names: 3, shuffle: 4}}"
    path = tokenizer_yaml(place, shards, validate_every=100)
    options = [f"data.train={stream}", "data.validation=null", f"data.num_workers={workers}"]

    def run(name):
        return train(load_experiment(path, [*options, f"output_dir={place / name}"]))

    whole = run("whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            run("again")
    again = run("again")
    assert logged_losses(again)[5] == logged_losses(whole)[5]
    one, other = weights(whole), weights(again)
    assert all(torch.equal(one[key], other[key]) for key in one)


def plain_and_compressed(folder, members) -> list[str]:
    """A shard that is read where it lies, and one that is copied before."""
    place = write_shard(folder / "plain.tar", members)
    packed = folder / "packed.tar.gz"
    packed.write_bytes(gzip.compress(Path(place).read_bytes()))
    return [place, str(packed)]


def test_samples_beyond_the_stated_ones_are_mentioned_once(tmp_path, caplog):
    """They were lost without a word: an index of before, or a wrong number."""
    for url in plain_and_compressed(tmp_path, {f"{i}.png": encoded() for i in range(3)}):
        caplog.clear()
        data = WebDatasetStream(url, samples=2, label_key=None)
        assert [Path(data[i]["key"]).name[-1] for i in (0, 1, 0)] == ["0", "1", "0"]
        assert caplog.text.count("holds more than the 2 samples that are stated") == 1


@pytest.mark.parametrize(("option", "value"), [("image_key", "jpgg"), ("label_key", "klass")])
def test_a_key_that_no_sample_has_is_named_at_the_first(tmp_path, option, value):
    """All of a data set was read, with a warning for each sample, before the mistake was named."""
    samples = {f"{i}.png": encoded() for i in range(3)} | {f"{i}.cls": b"1" for i in range(3)}
    members = dict(sorted(samples.items()))
    for url in plain_and_compressed(tmp_path, members):
        data = WebDatasetStream(url, class_names=2, **{option: value})
        with pytest.raises(ValueError, match=rf"{option}='{value}' is in no sample of .*name"):
            data[0]
