"""Data sets of a user's pictures give one kind of item, in one order, and name what is wrong."""

import contextlib
import io
import json
import pickle
import sys
import tarfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from helpers.files import write_shard
from PIL import Image

from flextok.data.datasets import HuggingFaceImages, ImageFolder, WebDatasetImages
from flextok.emoji.datasets import Emoji
from flextok.emoji.scenes import EmojiScenes
from flextok.images import CorruptPicture, load_picture, to_rgb
from flextok.registry import DATASETS, make_dataset
from flextok.schema import ConfigError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(color=RED, size=(8, 6), form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form, **options)
    return buffer.getvalue()


def check_item(item, names):
    assert set(item) >= {"image", "label", "caption", "key"}
    assert item["image"].mode == "RGB"
    assert 0 <= item["label"] < len(names)
    assert type(item["label"]) is int
    assert isinstance(item["caption"], str)
    assert isinstance(item["key"], str)


def test_registry():
    assert set(DATASETS) == {
        *("emoji", "emoji_scenes", "fashion_mnist", "folder", "huggingface"),
        *("webdataset", "webdataset_stream"),
    }
    for name in ("emoji", "emoji_scenes"):
        dataset = DATASETS[name](split="validation")
        check_item(dataset[0], dataset.class_names)


def test_a_caption_that_cannot_be_opened_costs_its_sample(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "a.txt").write_text("a red image")
    data, plain = ImageFolder(tmp_path), open

    def refuse(path, *rest, **options):  # permissions do not stop the superuser
        if str(path).endswith(".txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *rest, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CorruptPicture, match=r"a\.txt: Permission denied"):
        data[0]


def test_a_list_is_joined_each_part_as_often_as_it_says():
    parts = [
        {"name": "emoji", "split": "validation", "repeat": 3},
        {"name": "emoji_scenes", "length": 5},
    ]
    joined, emoji = make_dataset(parts), Emoji("validation")
    assert len(joined) == 3 * len(emoji) + 5
    assert joined.class_names == emoji.class_names + EmojiScenes(length=5).class_names
    for start in (0, len(emoji), 2 * len(emoji)):
        assert joined[start + 7]["key"] == emoji[7]["key"]
    assert parts[0]["repeat"] == 3  # the config stays as it was
    for bad in (0, 1.5, "many", True):
        with pytest.raises(ConfigError, match="repeat="):
            make_dataset([{**parts[0], "repeat": bad}])


# --- pictures -----------------------------------------------------------------------------------


def in_mode(mode: str) -> Image.Image:
    """A red (in grey modes: mid-grey) picture of that mode."""
    if mode == "I;16":
        return Image.fromarray(np.full((6, 8), 128 * 257, np.uint16))
    if mode == "I":
        return Image.new("I", (8, 6), 128 * 257)
    if mode in ("L", "LA"):
        return Image.new("L", (8, 6), 128).convert(mode)
    return Image.new("RGB", (8, 6), RED).convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "I", "I;16"])
def test_grey_modes(mode):
    assert to_rgb(in_mode(mode)).getpixel((1, 1)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "RGBa"])
def test_color_modes(mode):
    color = to_rgb(in_mode(mode)).getpixel((1, 1))
    assert np.abs(np.subtract(color, RED)).max() <= 2


def test_one_bit():
    assert to_rgb(Image.new("1", (8, 6), 1)).getpixel((0, 0)) == WHITE
    assert to_rgb(Image.new("1", (8, 6), 0)).getpixel((0, 0)) == (0, 0, 0)


def test_sixteen_bit_grey_png_is_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    loaded = np.asarray(load_picture(tmp_path / "deep.png"))[0, :, 0].astype(int)
    assert np.abs(loaded - np.arange(256)).max() <= 1


def test_cmyk_jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(buffer, "JPEG", quality=95)
    assert np.abs(np.subtract(load_picture(buffer.getvalue()).getpixel((8, 8)), RED)).max() <= 6


def test_transparency_is_composited_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png").getpixel((0, 0)) == WHITE
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "half.webp", lossless=True)
    assert load_picture(tmp_path / "half.webp").getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    for name in ("p.png", "p.gif"):
        palette.save(tmp_path / name, transparency=0)
        picture = load_picture(tmp_path / name)
        assert picture.getpixel((0, 0)) == WHITE
        assert picture.getpixel((1, 1)) == RED
    Image.new("RGB", (4, 4), RED).save(tmp_path / "key.png", transparency=RED)
    assert load_picture(tmp_path / "key.png").getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Each stored picture is the upright one turned by the inverse of its orientation."""
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))  # a red top left corner
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", quality=95, exif=exif)
    loaded = load_picture(buffer.getvalue())
    assert loaded.size == (32, 16)
    assert np.abs(np.subtract(loaded.getpixel((2, 2)), RED)).max() < 12
    assert np.abs(np.subtract(loaded.getpixel((28, 12)), WHITE)).max() < 12


def test_sources(tmp_path):
    data = encoded()
    (tmp_path / "a.png").write_bytes(data)
    with open(tmp_path / "a.png", "rb") as file:
        pictures = [
            load_picture(source)
            for source in (
                data,
                io.BytesIO(data),
                file,
                tmp_path / "a.png",
                str(tmp_path / "a.png"),
            )
        ]
    assert {p.tobytes() for p in pictures} == {Image.new("RGB", (8, 6), RED).tobytes()}


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def noisy(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_pictures_are_named(tmp_path, form):
    path = tmp_path / f"cut.{form.lower()}"
    path.write_bytes(noisy(form)[:1500])
    with pytest.raises(CorruptPicture, match=r"cut\."):
        load_picture(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "odd.png").write_bytes(content)
    with pytest.raises(CorruptPicture, match=r"odd\.png: ."):
        load_picture(tmp_path / "odd.png")


def test_missing_file_and_bytes_are_named(tmp_path):
    with pytest.raises(CorruptPicture, match=r"gone\.png"):
        load_picture(tmp_path / "gone.png")
    with pytest.raises(CorruptPicture, match="row 7"):
        load_picture(b"nothing", "row 7")


def test_decompression_bomb(monkeypatch):
    data = encoded(size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CorruptPicture, match=r"big: .*bomb"):
        load_picture(data, "big")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_raises_nothing_but_corrupt_picture():
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        original = noisy(form)
        for _ in range(40):
            damaged = bytearray(original)
            for position in rng.integers(0, min(len(damaged), 400), 8):
                damaged[position] = rng.integers(256)
            with contextlib.suppress(CorruptPicture):
                load_picture(bytes(damaged))


def test_corrupt_picture_crosses_processes():
    error = pickle.loads(pickle.dumps(CorruptPicture("a.png", "truncated")))
    assert (error.name, str(error)) == ("a.png", "a.png: truncated")


# --- folder -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("dog/b.png", "cat/deep/er/a.JPG", "cat/z.webp", ".cache/x.png", "dog/._b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded())
    (tmp_path / "cat" / "z.txt").write_text(" a cat, asleep \n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_folder(folder):
    dataset = ImageFolder(folder)
    assert dataset.class_names == ["cat", "dog"]
    items = [dataset[i] for i in range(len(dataset))]
    assert [i["key"] for i in items] == ["cat/deep/er/a.JPG", "cat/z.webp", "dog/b.png"]
    assert [i["label"] for i in items] == [0, 0, 1]
    assert [i["caption"] for i in items] == ["cat", "a cat, asleep", "dog"]
    for item in items:
        check_item(item, dataset.class_names)


def test_flat_folder_is_one_class(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    dataset = ImageFolder(str(tmp_path))
    assert dataset.class_names == ["unlabelled"]
    assert dataset[0]["label"] == 0


def test_folder_options(folder):
    assert ImageFolder(folder, label_from="none").class_names == ["unlabelled"]
    assert len(ImageFolder(folder, extensions=[".webp"])) == 1
    # a set that lacks a class keeps the numbers of the one that has it
    assert ImageFolder(folder, class_names=["ant", "dog", "cat"]).labels == [2, 2, 1]


def test_folder_links_that_lead_back(folder):
    (folder / "dog" / "up").symlink_to(folder, target_is_directory=True)
    assert len(ImageFolder(folder)) == 3


def test_corrupt_file_is_raised_by_name_when_read(folder):
    (folder / "dog" / "b.png").write_bytes(encoded()[:30])
    dataset = ImageFolder(folder)
    dataset[0]
    with pytest.raises(CorruptPicture, match=r"b\.png"):
        dataset[2]


def test_folder_mistakes(folder, tmp_path_factory):
    with pytest.raises(ValueError, match="label_from='name' must be folder or none"):
        ImageFolder(folder, label_from="name")
    with pytest.raises(ValueError, match="/no/where"):
        ImageFolder("/no/where")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=r"holds no pictures \(\.jpg"):
        ImageFolder(empty)
    with pytest.raises(ValueError, match="'cat' is none of the 1 classes dog"):
        ImageFolder(folder, class_names=["dog"])
    (folder / "loose.png").write_bytes(encoded())
    with pytest.raises(ValueError, match=r"loose\.png.*label_from=none"):
        ImageFolder(folder)


# --- WebDataset ---------------------------------------------------------------------------------


def test_webdataset_reads_shards_in_order_at_random(tmp_path):
    for shard in range(3):
        members = {}
        for i in range(4):
            key = f"x/{shard}-{i}"
            members[f"{key}.png"] = encoded((shard, i, 9))
            members[f"{key}.cls"] = b"%d\n" % i
            members[f"{key}.txt"] = f"picture {shard} {i}".encode()
        write_shard(tmp_path / f"part-{shard:03}.tar", members)
    by_brace = WebDatasetImages(str(tmp_path / "part-{000..002}.tar"))
    by_glob = WebDatasetImages([str(tmp_path / "*.tar")])
    assert by_brace.keys == by_glob.keys == [f"x/{s}-{i}" for s in range(3) for i in range(4)]
    assert by_brace.class_names == ["0", "1", "2", "3"]
    for index in (11, 0, 6, 6):
        item = pickle.loads(pickle.dumps(by_brace))[index]
        check_item(item, by_brace.class_names)
        assert item["image"].getpixel((0, 0)) == (index // 4, index % 4, 9)
        assert item["label"] == index % 4
        assert item["caption"] == f"picture {index // 4} {index % 4}"
    with pytest.raises(IndexError):
        by_brace[12]


def test_webdataset_json_fields_and_names(tmp_path):
    fields = json.dumps({"label": "tree", "caption": "a tree"}).encode()
    other = json.dumps({"label": "car"}).encode()
    url = write_shard(
        tmp_path / "a.tar",
        {"1.json": fields, "1.jpeg": encoded(form="JPEG"), "2.PNG": encoded(), "2.json": other},
    )
    dataset = WebDatasetImages(url)
    assert dataset.class_names == ["car", "tree"]
    assert [dataset[i]["caption"] for i in range(2)] == ["a tree", "car"]
    assert [dataset[i]["label"] for i in range(2)] == [1, 0]
    assert WebDatasetImages(url, class_names=["tree", "car"]).labels == [0, 1]
    assert WebDatasetImages(url, label_key=None).class_names == ["unlabelled"]


def test_webdataset_reads_the_emoji_shard_as_emoji_does():
    shard = resources.files("flextok.emoji").joinpath("assets", "emoji-64.tar")
    dataset = WebDatasetImages(str(shard), label_key="group", caption_key="name")
    emoji = Emoji("all")
    assert dataset.class_names == emoji.class_names
    for index in (0, 700, len(emoji) - 1):
        a, b = dataset[index], emoji[index]
        assert np.abs(np.subtract(a["image"], np.asarray(b["image"], int))).max() <= 1
        assert {**a, "image": 0} == {**b, "image": 0}


def test_webdataset_mistakes(tmp_path, caplog):
    url = write_shard(tmp_path / "a.tar", {"1.png": encoded()})
    with pytest.raises(ValueError, match=r"label_key='cls;label' .* 1, which has png"):
        WebDatasetImages(url)
    with pytest.raises(ValueError, match="image_key='jpg' is in no sample"):
        WebDatasetImages(url, image_key="jpg", label_key=None)
    with pytest.raises(ValueError, match=r"remote: take name webdataset_stream"):
        WebDatasetImages("https://host/a.tar")
    for remote in ("s3://bucket/a.tar", "pipe:cat a.tar"):
        with pytest.raises(ValueError, match=r"neither a file nor an http\(s\) address"):
            WebDatasetImages(remote)
    with pytest.raises(ValueError, match=r"none\.tar.*matches no file"):
        WebDatasetImages(str(tmp_path / "none.tar"))
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"b\.tar\.gz'?: no sample can be read"):
        WebDatasetImages(str(tmp_path / "b.tar.gz"))
    assert "b.tar.gz is no whole, uncompressed tar" in caplog.text
    (tmp_path / "cut.tar").write_bytes(Path(url).read_bytes()[:520])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        WebDatasetImages(str(tmp_path / "cut.tar"), label_key=None)


def test_webdataset_damaged_and_missing_pictures_are_named(tmp_path):
    url = write_shard(
        tmp_path / "a.tar",
        {"1.png": encoded()[:40], "1.cls": b"0", "2.cls": b"0", "3.png": encoded(), "3.cls": b"0"},
    )
    dataset = WebDatasetImages(url)
    for index, reason in ((0, r"a\.tar: 1: "), (1, r"a\.tar: 2: the sample holds no picture")):
        with pytest.raises(CorruptPicture, match=reason):
            dataset[index]
    assert dataset[2]["key"] == "3"


# --- Hugging Face -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> str:
    datasets = pytest.importorskip("datasets")
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    columns = {
        "image": [Image.new("RGB", (8, 6), RED), half],
        "label": [1, 0],
        "words": ["a red picture", None],
        "kind": ["b", "a"],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "words": datasets.Value("string"),
            "kind": datasets.Value("string"),
        }
    )
    table = datasets.Dataset.from_dict(columns, features=features)
    path = tmp_path / "saved"
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(path))
    table.save_to_disk(str(tmp_path / "single"))
    return str(path)


def test_huggingface(saved):
    dataset = HuggingFaceImages(saved, caption_column="words")
    assert dataset.class_names == ["no", "yes"]
    items = [dataset[i] for i in range(2)]
    for item in items:
        check_item(item, dataset.class_names)
    assert [i["label"] for i in items] == [1, 0]
    assert [i["caption"] for i in items] == ["a red picture", "no"]
    assert items[0]["image"].getpixel((0, 0)) == RED
    assert items[1]["image"].getpixel((0, 0)) == WHITE
    assert len(HuggingFaceImages(saved, split="test")) == 1
    assert HuggingFaceImages(saved, label_column="kind").class_names == ["a", "b"]
    assert HuggingFaceImages(saved, label_column=None).class_names == ["unlabelled"]
    assert len(HuggingFaceImages(str(Path(saved).parent / "single"))) == 2
    assert pickle.loads(pickle.dumps(dataset))[0]["label"] == 1


def test_the_split_of_a_saved_folder_is_the_one_that_was_named(saved):
    """Validation ran on the training images: a folder of one split stood for any."""
    single = str(Path(saved).parent / "single")
    with pytest.raises(ValueError, match=r"split='test': .*single' states no split; leave split"):
        HuggingFaceImages(single, split="test")
    for path in (single, saved):
        with pytest.raises(ValueError, match="config='large' is of the hub"):
            HuggingFaceImages(path, config="large")
    assert HuggingFaceImages(saved)[0]["key"] == HuggingFaceImages(single)[0]["key"] == "train-0"


def test_a_saved_folder_that_is_written_again_is_another(tmp_path):
    """Its fingerprint is of the paths, not of the pixels that it holds."""
    datasets = pytest.importorskip("datasets")
    found = []
    for colour in (RED, WHITE):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "0.png")
        table = datasets.Dataset.from_dict({"image": [str(tmp_path / "0.png")]})
        table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
        dataset = HuggingFaceImages(str(tmp_path / "saved"), label_column=None)
        assert list(dataset.state()) == list(dataset.state())
        found.append((dataset[0]["image"].getpixel((0, 0)), tuple(dataset.state())))
    assert found[0][0] == RED
    assert found[1][0] == WHITE
    assert found[0][1] != found[1][1]


def test_huggingface_mistakes(saved):
    with pytest.raises(ValueError, match=r"split='validation' .* which has train, test"):
        HuggingFaceImages(saved, split="validation")
    with pytest.raises(ValueError, match=r"'picture' is not in .* its columns: image, label"):
        HuggingFaceImages(saved, image_column="picture")


def test_huggingface_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install flextok\[data\]"):
        HuggingFaceImages("any")
