"""Any torch data set of images goes in; several become one, and labels go by name."""

import numpy as np
import pytest
import torch
from helpers.files import CATS_AND_DOGS, draw_pictures
from helpers.models import tiny_tokenizer
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from flextok.data.datasets import ImageFolder
from flextok.data.labels import check_names, index_labels
from flextok.data.pictures import CorruptPicture
from flextok.data.sets import Joined, adapt, data_files, labels_count, take
from flextok.data.tokens import TokenDataset, build_token_cache, cache_identity
from flextok.data.transforms import ImageTransform
from flextok.draws import sample_evenly
from flextok.emoji.scenes import EmojiScenes


class Listed(Dataset):
    """A user's own data set."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


RED = Image.new("RGB", (20, 16), "red")


def tokens_of(dataset, folder):
    build_token_cache(folder, tiny_tokenizer(), dataset, ImageTransform(16), {})
    return TokenDataset(folder)


def test_items_may_be_mappings_tuples_or_images(tmp_path):
    tensor = torch.rand(3, 16, 16) * 2 - 1
    items = [RED, (RED,), (RED, 2), [RED, torch.tensor(1)], {"image": RED}]
    items += [{"image": RED, "label": 1, "caption": "a red image"}, (tensor, 0)]
    dataset = adapt(Listed(items), class_names=["ant", "bee", "cat"])
    found = [dataset[i] for i in range(len(dataset))]
    assert [int(item["label"]) for item in found] == [0, 0, 2, 1, 0, 1, 0]
    assert [item["caption"] for item in found][2:6] == ["cat", "bee", "ant", "a red image"]
    tokens = tokens_of(dataset, tmp_path)
    assert tokens.class_names == ["ant", "bee", "cat"]
    assert [int(tokens[i]["label"]) for i in range(7)] == [0, 0, 2, 1, 0, 1, 0]
    assert tokens.captions == ["ant", "ant", "cat", "bee", "ant", "a red image", "ant"]
    assert all(torch.equal(tokens[i]["indices"], tokens[0]["indices"]) for i in range(6))


def test_a_data_set_with_class_names_may_have_items_of_any_form():
    """Class names made it pass for one of the package's own, which have mappings as items."""
    dataset = Listed([(RED, 1), {"image": RED}, RED, (RED, None), (RED, {}), (RED, "bee")])
    dataset.class_names, dataset.labels_count = ("ant", "bee"), True
    found = adapt(dataset)
    assert found.class_names == ["ant", "bee"]
    assert labels_count(found)
    assert [found[i]["caption"] for i in range(6)] == ["bee", "ant", "ant", "", "", "bee"]
    prepare = ImageTransform(16).prepare
    assert [prepare(found[i])["label"] for i in range(6)] == [1, 0, 0, -1, -1, 1]
    assert adapt(found) is found
    dataset.class_names = None
    assert adapt(dataset).class_names == ["unlabelled"]


@pytest.mark.parametrize("error", [OSError, SyntaxError, Image.DecompressionBombError])
def test_an_item_that_cannot_be_read_is_named(error):
    class Broken(Listed):
        def __getitem__(self, index):
            raise error("truncated")

    with pytest.raises(CorruptPicture, match="item 1 of Broken: truncated"):
        adapt(Broken([RED, RED]))[1]


def test_a_torchvision_data_set_as_it_is(tmp_path):
    folders = pytest.importorskip("torchvision.datasets")
    draw_pictures(tmp_path / "images", CATS_AND_DOGS)
    ours = tokens_of(ImageFolder(tmp_path / "images"), tmp_path / "ours")
    theirs = tokens_of(folders.ImageFolder(tmp_path / "images"), tmp_path / "theirs")
    assert theirs.class_names == ours.class_names == ["cats", "dogs"]
    assert theirs.captions == ours.captions
    for i in range(6):
        assert theirs[i]["label"] == ours[i]["label"]
        assert torch.equal(theirs[i]["indices"], ours[i]["indices"])


def test_tensors_in_8_bit_or_as_the_package_has_them(tmp_path):
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])
    bytes_ = tokens_of(adapt(TensorDataset(pixels, labels), 2), tmp_path / "bytes")
    images = pixels / 127.5 - 1
    floats = tokens_of(adapt(TensorDataset(images, labels), 2), tmp_path / "floats")
    assert torch.equal(bytes_.indices[:].long(), floats.indices[:].long())
    assert torch.equal(bytes_.labels, labels)


def test_labels_without_class_names_are_refused_where_they_matter(tmp_path):
    with pytest.raises(ValueError, match="label 3 is none of the 1 classes unlabelled: give class"):
        tokens_of(Listed([(RED, 3)]), tmp_path)


def test_some_items_keep_their_classes_and_their_files(tmp_path):
    draw_pictures(tmp_path, CATS_AND_DOGS)
    whole = ImageFolder(tmp_path)
    for some in (take(whole, 3), adapt(Subset(whole, [0, 2, 4]))):
        assert some.class_names == ["cats", "dogs"]
        labels = [some[i]["label"] for i in range(3)]
        assert labels == [whole[i]["label"] for i in some.indices]
        assert sorted({*labels}) == [0, 1]
        assert data_files(some) == data_files(whole)
        assert not labels_count(some)
    assert labels_count(take(EmojiScenes(length=10), 2))
    with pytest.raises(ValueError, match="limit 0 must be at least 1"):
        take(whole, 0)


@pytest.mark.parametrize("total", [1000, 997])
@pytest.mark.parametrize(("limit", "classes"), [(100, 10), (500, 2), (250, 4), (300, 5)])
def test_some_items_are_of_all_classes_whatever_their_order(total, limit, classes):
    """Every tenth image of a set whose ten classes take turns was of one class."""
    turns = [i % classes for i in range(total)]
    for labels in (turns, sorted(turns)):
        names = list("abcdefghij"[:classes])
        some = take(adapt(Listed([(RED, label) for label in labels]), class_names=names), limit)
        assert list(some.indices) == sorted({*some.indices})
        found = torch.tensor([labels[i] for i in some.indices]).bincount(minlength=classes)
        assert found.sum() == limit
        assert (found - limit / classes).abs().max() < 3 * (limit / classes) ** 0.5


@pytest.mark.parametrize(
    ("number", "total", "expected"),
    [
        (5, 5, [0, 1, 2, 3, 4]),
        (7, 3, [0, 0, 0, 1, 1, 2, 2]),
        (15, 10, [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9]),
    ],
)
def test_of_as_many_items_or_fewer_each_comes_as_often(number, total, expected):
    assert sample_evenly(number, total) == expected


def test_a_cache_of_some_items_is_none_of_others(tmp_path):
    draw_pictures(tmp_path / "in", CATS_AND_DOGS)
    whole, model = ImageFolder(tmp_path / "in"), tiny_tokenizer()
    transform = ImageTransform(model.image_size)
    joined = Joined([Subset(whole, [0]), Subset(whole, [3])])
    for kept, others in (
        (Subset(whole, [0, 1]), (Subset(whole, [2, 3]), Subset(whole, [1, 0]))),
        (joined, (Joined([Subset(whole, [0]), Subset(whole, [4])]),)),
    ):
        folder = tmp_path / str(len(others))
        for _ in range(2):  # made, then read
            build_token_cache(folder, model, kept, transform, cache_identity(model, {}))
        for other in others:
            with pytest.raises(ValueError, match=r"\(items differ\)"):
                build_token_cache(folder, model, other, transform, cache_identity(model, {}))


def test_what_has_no_items_by_number_or_no_image_is_named():
    class Endless(IterableDataset):
        def __iter__(self):
            yield RED

    for data in (Endless(), DataLoader([RED]), 3):
        with pytest.raises(ValueError, match=f"a {type(data).__name__} has no items by number"):
            adapt(data)
    with pytest.raises(ValueError, match=r"item 0 of Listed holds 'pixels' and no 'image'"):
        adapt(Listed([{"pixels": RED}]))[0]


def test_accents_of_either_form_are_one_class():
    names = ["caf\u00e9", "tea"], ["cafe\u0301", "milk"]
    one, two = (adapt(Listed([(RED, 0), (RED, 1)]), some) for some in names)
    joined = Joined([one, two])
    assert joined.class_names == ["caf\u00e9", "tea", "milk"]
    assert [joined[i]["label"] for i in range(4)] == [0, 1, 0, 2]
    found = index_labels(["cafe\u0301", "tea", "caf\u00e9"], None)
    assert found == (["caf\u00e9", "tea"], [0, 1, 0])
    with pytest.raises(ValueError, match="twice: each class has one name"):
        check_names(["tea", "caf\u00e9", "cafe\u0301"])


def test_data_sets_of_all_kinds_are_joined_by_name():
    one, two = adapt(Listed([(RED, 1)]), ["ant", "bee"]), adapt(Listed([(RED, 0)]), ["bee"])
    joined = Joined([one, two])
    assert joined.class_names == ["ant", "bee"]
    assert [joined[i]["label"] for i in range(2)] == [1, 1]


def test_labels_are_names_numbers_or_none(tmp_path):
    """Names and floats were the first class, and in joined sets -1 was the last one."""
    labels = ["bee", 1, 2.0, torch.tensor(2), np.int64(1), np.float32(0), "cat", -1, "dog", 0.5]
    items = Listed([(RED, label) for label in labels])
    dataset = adapt(items, class_names=["ant", "bee", "cat"])
    found = [dataset[i] for i in range(len(labels))]
    assert [item["label"] for item in found] == [1, 1, 2, 2, 1, 0, 2, -1, -1, -1]
    assert [item["caption"] for item in found][6:] == ["cat", "", "", ""]
    other = adapt(Listed([(RED, 0)]), class_names=["dog"])
    joined = Joined([other, dataset])
    assert [joined[i]["label"] for i in range(len(joined))] == [0, 2, 2, 3, 3, 2, 1, 3, -1, -1, -1]
    prepared = ImageTransform(16).prepare(joined[9])
    assert prepared["label"] == -1
    with pytest.raises(ValueError, match="label -1 is none of the 3 classes ant, bee, cat"):
        tokens_of(dataset, tmp_path)


def test_other_keys_of_a_users_items_are_left_alone(tmp_path):
    """A size was taken for a bucket's, and a tuple of captions had no encode()."""
    items = [{"image": RED, "size": (48, 64), "caption": ("a red image", "red")}] * 2
    dataset = adapt(Listed([*items, {"image": RED, "latents": 3, "caption": "", "key": 7}]))
    assert ImageTransform(16).prepare(dataset[0])["image"].shape == (3, 16, 16)
    assert dataset[0]["captions"] == ["a red image", "red"]
    assert (dataset[2]["key"], dataset[2]["caption"], "latents" in dataset[2]) == ("7", "", False)
    with pytest.raises(ValueError, match="is no text"):
        adapt(Listed([{"image": RED, "caption": {"en": "red"}}]))[0]


def test_a_subset_with_items_of_its_own_keeps_them():
    class Varied(Subset):
        def __getitem__(self, index):
            return {**self.dataset[self.indices[index]], "image": Image.new("RGB", (8, 8), "blue")}

        def __getitems__(self, indices):
            return [self[index] for index in indices]

    whole = adapt(Listed([(RED, 0), (RED, 1), (RED, 1)]), class_names=["ant", "bee"])
    some = adapt(Varied(whole, [2, 0]))
    assert some.class_names == ["ant", "bee"]
    assert [some[i]["label"] for i in range(2)] == [1, 0]
    assert some[0]["image"].getpixel((0, 0)) == (0, 0, 255)
