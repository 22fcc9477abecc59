"""Fashion-MNIST's files in each of the layouts in which they come, twins of which are written."""

import gzip

import numpy as np
import pytest
import torchvision
from helpers.files import write_idx

from flextok.config import load_experiment
from flextok.data import fashion_mnist
from flextok.data.fashion_mnist import FashionMNIST
from flextok.data.sets import data_files
from flextok.data.transforms import ImageTransform
from flextok.registry import make_dataset

SPLITS = {"train": 12, "test": 5}  # numbers of images


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and not the files that this machine may have."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_items_are_what_the_files_hold(tmp_path, packed, below):
    pixels, labels = write_idx(tmp_path / "data" / below, SPLITS, packed)["test"]
    dataset = make_dataset(
        {"name": "fashion_mnist", "root": str(tmp_path / "data"), "split": "test"}
    )
    assert len(dataset) == SPLITS["test"]
    assert dataset.class_names[0] == "T-shirt/top"
    assert dataset.class_names[9] == "Ankle boot"
    for index, item in enumerate(dataset[i] for i in range(len(dataset))):
        image = np.asarray(item["image"])
        assert image.shape == (28, 28, 3)
        assert (image == pixels[index][..., None]).all()
        assert item["label"] == labels[index]
        assert item["caption"] == dataset.class_names[labels[index]]
        assert item["key"] == f"test-{index}"
    # nothing is resized or cropped on the way to a model of 28 px
    tensor = ImageTransform(28)(dataset[0]["image"])
    assert np.allclose(tensor[1].numpy(), pixels[0] / 127.5 - 1, atol=1e-6)


def test_the_first_images_are_taken(tmp_path):
    write_idx(tmp_path, SPLITS)
    whole, few = FashionMNIST(tmp_path), FashionMNIST(tmp_path, limit=3)
    assert (len(whole), len(few)) == (12, 3)
    assert few.labels == whole.labels[:3]
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        FashionMNIST(tmp_path, limit=0)


def test_own_files_come_before_debians_and_both_before_a_download(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", asked.append)
    (tmp_path / "root").mkdir()
    write_idx(tmp_path / "debian", SPLITS, packed=True)
    assert FashionMNIST(tmp_path / "root").files[0].parent == tmp_path / "debian"
    write_idx(tmp_path / "root", {"train": 3})
    assert len(FashionMNIST(tmp_path / "root")) == 3
    assert len(FashionMNIST(tmp_path / "root", "test")) == SPLITS["test"]
    assert not asked


def test_a_download_fills_the_root(tmp_path, monkeypatch):
    """torchvision unpacks into a folder of its own below the root."""

    def download(self):
        write_idx(tmp_path / "root/FashionMNIST/raw", SPLITS)

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    assert len(FashionMNIST(tmp_path / "root")) == SPLITS["train"]


def test_without_files_the_error_names_all_ways(tmp_path):
    with pytest.raises(ValueError, match="is neither in root=") as error:
        FashionMNIST(tmp_path / "root")
    for words in (str(tmp_path / "root"), "debian", "download", "dataset-fashion-mnist"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="split='validation' must be one of train, test"):
        FashionMNIST(tmp_path, "validation")


@pytest.mark.parametrize("damage", ["cut", "header", "gzip", "labels", "counts"])
def test_damaged_files_are_named(tmp_path, damage):
    write_idx(tmp_path, SPLITS, packed=damage == "gzip")
    images, labels = fashion_mnist.split_files(tmp_path, "train")
    wrong = labels if damage in ("labels", "counts") else images
    content = wrong.read_bytes()
    if damage == "labels":
        content = content[:-1] + bytes([10])
    elif damage == "counts":
        content = content[:4] + (11).to_bytes(4, "big") + content[8:-1]
    else:
        content = bytes(100) if damage == "header" else content[:-5]
    wrong.write_bytes(content)
    with pytest.raises(ValueError, match=wrong.name):
        FashionMNIST(tmp_path)


def test_a_cache_knows_when_the_files_change(tmp_path):
    write_idx(tmp_path, SPLITS)
    before = data_files(FashionMNIST(tmp_path))
    assert data_files(FashionMNIST(tmp_path)) == before
    write_idx(tmp_path, {"train": 13})
    assert data_files(FashionMNIST(tmp_path)) != before
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:  # the plain one counts
        file.write(b"damaged")
    assert len(FashionMNIST(tmp_path)) == 13


def test_a_limit_is_a_number_in_an_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "task: tokenizer\noutput_dir: x\nmodel: {name: flextok}\ntrainer: {max_steps: 1}\n"
        "data: {train: {name: fashion_mnist}, validation: {name: fashion_mnist, split: test}}\n"
    )
    config = load_experiment(path, ["data.validation.limit=7", "data.train.root=elsewhere"])
    assert config.data.validation == {"name": "fashion_mnist", "split": "test", "limit": 7}
    assert config.data.train == {"name": "fashion_mnist", "root": "elsewhere"}
