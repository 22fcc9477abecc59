"""Training images sorted by their proportions, in batches of one shape."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import draw_pictures, png, write_shard
from helpers.models import DRAWER, tiny_tokenizer
from helpers.runs import SIX_STEPS, Stop, interrupt_after, logged_losses, same
from PIL import Image
from torch.utils.data import DataLoader, Subset

from flextok.config import load_experiment
from flextok.data.augmentation import Augmentation
from flextok.data.buckets import sort_into
from flextok.data.datasets import ImageFolder
from flextok.data.latents import check_cacheable
from flextok.data.sets import Joined, adapt
from flextok.data.stream import PositionSampler, Stream, collate
from flextok.data.transforms import ImageTransform
from flextok.data.web import WebDatasetImages, WebDatasetStream
from flextok.images import header_size, load_picture
from flextok.objectives import DrawingObjective
from flextok.pipeline import load
from flextok.schema import ConfigError
from flextok.training.run import train

SHAPES = [(16, 16), (24, 12), (12, 24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Eleven pictures: five tall ones, two wide ones, four squares."""
    place = tmp_path_factory.mktemp("shapes")
    draw_pictures(place, [f"tall/{i}.png" for i in range(5)], width=20, height=43)
    draw_pictures(place, [f"wide/{i}.png" for i in range(2)], width=90, height=50)
    draw_pictures(place, [f"square/{i}.png" for i in range(4)], width=19, height=20)
    return place


def stream(folder, **options):
    data = ImageFolder(folder)
    prepare = ImageTransform(16, Augmentation(flip=True, crop="random")).prepare
    return Stream(data, prepare, seed=3, buckets=sort_into(data, SHAPES), **options)


def test_each_picture_goes_to_the_nearest_proportions(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = ImageFolder(folder)
    expected = [{"square": 0, "tall": 1, "wide": 2}[path.parts[0]] for path in data.paths]
    assert sort_into(data, SHAPES).numbers.tolist() == expected
    assert "4 of 16 x 16, 5 of 24 x 12, 2 of 12 x 24" in caplog.text
    # inside of other data sets, in workers, and decoded where there is no file
    some = adapt(Subset(Joined([data, data]), [12, 3]))
    assert sort_into(some, SHAPES, num_workers=1).numbers.tolist() == [expected[1], expected[3]]
    decoded = [data[i]["image"] for i in range(len(data))]
    assert sort_into(adapt(decoded), SHAPES).numbers.tolist() == expected
    # a picture is as it is shown: turned by its EXIF orientation
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("jpg", "png", "tif", "webp"):
        Image.new("RGB", (40, 20)).save(tmp_path / f"turned.{kind}", exif=exif)
        assert header_size(tmp_path / f"turned.{kind}") == (20, 40)
        assert load_picture(tmp_path / f"turned.{kind}").size == (20, 40)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert sort_into(ImageFolder(tmp_path), SHAPES).numbers.tolist() == [0, 1, 1, 1, 1]


def test_a_batch_has_one_shape_and_an_epoch_every_sample(folder):
    samples = stream(folder)
    size, per_epoch = 3, 2 + 2 + 1  # of 4, 5 and 2 samples
    orders = []
    for epoch in range(3):
        batches = [samples.batch(epoch * per_epoch + i, size) for i in range(per_epoch)]
        for positions in batches:
            assert len(positions) == size
            assert {p // 11 for p in positions} == {epoch}
            numbers = samples.buckets.numbers[[samples.index_at(p) for p in positions]]
            assert len(set(numbers.tolist())) == 1
        seen = sorted({samples.index_at(p) for positions in batches for p in positions})
        assert seen == list(range(11))
        orders.append([samples.index_at(p) for positions in batches for p in positions])
    assert len({tuple(order) for order in orders}) == 3


def test_batches_are_the_same_for_any_processes_workers_and_restarts(folder):
    def images(count, start=0, workers=0, ranks=1):
        found = {}
        for rank in range(ranks):
            samples = stream(folder)
            sampler = PositionSampler(samples, 2, 2 * start, rank, ranks)
            loader = DataLoader(
                samples, batch_sampler=sampler, collate_fn=collate, num_workers=workers
            )
            batches = zip(range(count // ranks), loader, strict=False)
            found |= {i * ranks + rank: batch["image"] for i, batch in batches}
        return [found[i] for i in range(count)]

    plain = images(12)
    assert {tuple(batch.shape) for batch in plain} == {(2, 3, *shape) for shape in SHAPES}
    others = images(12, ranks=2), images(4) + images(8, start=4), images(12, workers=2)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_batches_of_another_size_go_on_at_about_the_same_place(folder):
    samples = stream(folder)
    assert samples.resized(33, 3, 3) == 33
    # an epoch has 5 batches of 3, and 6 of 2
    assert samples.resized(3 * (2 * 5 + 3), 3, 2) == 2 * (2 * 6 + 3)
    assert samples.resized(3 * 5, 3, 2) == 2 * 6


def test_what_stands_in_for_a_damaged_picture_has_its_shape(folder, tmp_path, caplog):
    for path in folder.rglob("*.png"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    samples = stream(tmp_path)
    (tmp_path / "tall" / "2.png").write_bytes(b"not a picture")
    shapes = [samples.buckets.shapes[n] for n in samples.buckets.numbers]
    for position in range(11):
        image = samples[position]["image"]
        assert tuple(image.shape[1:]) == shapes[samples.index_at(position)]
    assert "skipped an unreadable sample" in caplog.text


def test_shapes_of_unequal_work_and_data_that_cannot_be_sorted_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"24 x 16 has 1.50 times the pixels of 16 x 16"):
        sort_into(ImageFolder(folder), [(16, 16), (24, 16)])
    shard = write_shard(tmp_path / "0.tar", {"a.png": b""})
    with pytest.raises(ConfigError, match="take a folder or a Hugging Face data set"):
        sort_into(WebDatasetStream(shard, samples=3, label_key=None), SHAPES)
    local = WebDatasetImages(write_shard(tmp_path / "1.tar", {"a.png": png()}), label_key=None)
    with pytest.raises(ConfigError, match="take a folder or a Hugging Face data set"):
        sort_into(Joined([ImageFolder(folder), local]), SHAPES)
    shaped = tiny_tokenizer(shapes=[[24, 12]], drawer=DRAWER)
    objective = DrawingObjective(shaped, weights=tiny_tokenizer())
    with pytest.raises(ConfigError, match="holds latents of one shape"):
        check_cacheable(objective)


def test_a_run_on_rectangles_and_squares_continues_as_if_never_interrupted(tmp_path, monkeypatch):
    """The config for a CPU, with tiny sizes: 96 x 64, 64 x 96 and 80 x 80 pixels."""
    draw_pictures(tmp_path, [f"p/tall/{i}.png" for i in range(5)], width=64, height=96)
    draw_pictures(tmp_path, [f"p/wide/{i}.png" for i in range(3)], width=96, height=64)
    draw_pictures(tmp_path, [f"p/square/{i}.png" for i in range(4)], width=80, height=80)
    tiny = ["model.encoder_dim=32", "model.decoder_dim=32", "model.decoder_depth=2"]
    tiny += [f"data.{part}.root={tmp_path / 'p'}" for part in ("train", "validation")]
    tiny += [f"trainer.{key}={value}" for key, value in SIX_STEPS.items()]

    def run(name):
        path = "configs/quickstart_shapes.yaml"
        output = f"output_dir={tmp_path / name}"
        return train(load_experiment(path, [*tiny, "data.batch_size=2", output]))

    whole = run("whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            run("again")
    run("again")
    assert same(whole, tmp_path / "again")
    losses = logged_losses(whole)
    assert sorted(losses) == list(range(6))
    assert np.isfinite(list(losses.values())).all()
    tokenizer = load(whole)
    picture = tmp_path / "p" / "tall" / "0.png"
    indices = tokenizer.encode(picture, height=96, width=64)
    for k in (1, 5, 16):
        assert tokenizer.decode(indices[:, :k], height=96, width=64).shape == (1, 3, 96, 64)
