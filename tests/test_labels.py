"""Classes are known by their names: in labels, in joined sets, in a validation set of fewer."""

import io
import json
import shutil

import pytest
import torch
from helpers.files import draw_pictures, write_shard
from helpers.models import tiny_gpt, tiny_tokenizer
from helpers.runs import SIX_STEPS
from PIL import Image

from flextok.cli import main
from flextok.config import ExperimentConfig
from flextok.data.datasets import HuggingFaceImages, ImageFolder
from flextok.data.labels import balanced, index_labels, renumbering
from flextok.data.pictures import CorruptPicture
from flextok.data.sets import by_name
from flextok.data.web import WebDatasetImages, WebDatasetStream
from flextok.evaluation import Cell, Options, evaluate
from flextok.generators.conditioning import class_label
from flextok.registry import make_dataset
from flextok.schema import ConfigError, from_mapping
from flextok.training.prepare import prepare as prepare_run


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, *samples: dict[str, object]) -> str:
    """A sample a dict: extension -> text, or a mapping for .json."""
    members = {}
    for number, sample in enumerate(samples):
        members[f"{number}.png"] = picture()
        for extension, content in sample.items():
            text = content if isinstance(content, str) else json.dumps(content)
            members[f"{number}.{extension}"] = text.encode()
    return write_shard(path, members)


def named(data) -> list[str]:
    return [data.class_names[data[i]["label"]] for i in range(len(data))]


def test_a_name_of_digits_is_a_name(tmp_path):
    """It was read as a number: "001" of ["001", "002", "003"] became class 1, "002"."""
    url = shard(tmp_path / "a.tar", *({"cls": name} for name in ("001", "003", "002", "001")))
    names = ["001", "002", "003"]
    for data in (
        WebDatasetImages(url),
        WebDatasetImages(url, class_names=names),
        WebDatasetStream(url, class_names=names),
    ):
        assert data.class_names == names
        assert [data[i]["label"] for i in range(4)] == [0, 2, 1, 0]
    # names first, whatever their order and however they are stated
    for label in ("cls", "json"):
        samples = [{label: n if label == "cls" else {"label": int(n)}} for n in ("7", "5", "1")]
        url = shard(tmp_path / f"{label}.tar", *samples)
        for kind in (WebDatasetImages, WebDatasetStream):
            data = kind(url, class_names=["5", "7", "1"])
            assert [data[i]["label"] for i in range(3)] == [1, 0, 2]
            # numbers second: no class is called so
            data = kind(
                shard(tmp_path / "n.tar", {"cls": "2"}, {"cls": "00"}), class_names=["a", "b", "c"]
            )
            assert [data[i]["label"] for i in range(2)] == [2, 0]


def test_numbers_without_names_count_from_zero(tmp_path):
    url = shard(tmp_path / "a.tar", {"cls": "10"}, {"cls": "2"}, {"cls": "0"})
    data = WebDatasetImages(url)
    assert data.class_names == [str(i) for i in range(11)]
    assert [data[i]["label"] for i in range(3)] == [10, 2, 0]
    # one that is no number makes all of them names
    data = WebDatasetImages(shard(tmp_path / "b.tar", {"cls": "10"}, {"cls": "010"}, {"cls": "9"}))
    assert data.class_names == ["010", "10", "9"]
    assert named(data) == ["10", "010", "9"]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ["false", "true"]),
        ([1.0, 0.0], ["0", "1"]),
        (["1", "0"], ["0", "1"]),
        ([0, "x"], ["0", "x"]),
    ],
)
def test_labels_of_other_types(tmp_path, labels, names):
    url = shard(tmp_path / "a.tar", *({"json": {"label": label}} for label in labels))
    data = WebDatasetImages(url)
    assert data.class_names == names
    expected = [names.index(str(label).lower().removesuffix(".0")) for label in labels]
    assert data.labels == expected
    if "x" not in names:  # by number, where that is all that a stream is told
        stream = WebDatasetStream(url, class_names=2)
        assert [stream[i]["label"] for i in range(2)] == expected


def test_labels_that_are_none(tmp_path, caplog):
    url = shard(
        tmp_path / "a.tar", {"json": {"label": [1]}}, {"cls": "0"}, {"json": {"label": 0.5}}
    )
    assert len(WebDatasetImages(url)) == 1
    assert "label [1] is neither" in caplog.text
    stream = WebDatasetStream(url, class_names=2)
    for index in (0, 2):
        with pytest.raises(CorruptPicture, match="is neither a name nor a whole number"):
            stream[index]
    for label in ("-1", "2", "9" * 5000, "\u0661", "1e0", ""):
        stream = WebDatasetStream(shard(tmp_path / "b.tar", {"cls": label}), class_names=2)
        with pytest.raises(CorruptPicture, match="none of the class_names"):
            stream[0]
    for labels in ([1_700_000_000, 3], [-1, 2]):
        with pytest.raises(ValueError, match=f"label {labels[0]} is no class number"):
            index_labels(labels, None)


def test_class_names_that_are_none(tmp_path):
    url = shard(tmp_path / "a.tar", {"cls": "0"})
    for names, message in (
        ([1, 2, 3], 'holds 1, which is no text: write it as "1"'),
        (["a", "b", "a"], "holds 'a' twice"),
        ("abc", "must be a list of names"),
        (0, "class_names=0 must be"),
        (10**9, "class_names=1000000000 must be"),
    ):
        for kind in (WebDatasetImages, WebDatasetStream):
            with pytest.raises(ValueError, match=message):
                kind(url, class_names=names)


def test_folders_of_numbers_are_names(tmp_path):
    draw_pictures(tmp_path, ["1/a.png", "2/a.png", "10/a.png", "3/a.png"])
    data = ImageFolder(tmp_path)
    assert data.class_names == ["1", "10", "2", "3"]
    assert named(data) == ["1", "10", "2", "3"]
    with pytest.raises(ValueError, match="the folder '1' is none of the 2 classes cat, dog"):
        ImageFolder(tmp_path, class_names=["cat", "dog"])


def test_hugging_face_numbers_are_indices_and_text_is_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = [Image.new("RGB", (8, 8))] * 3

    def saved(labels, kind, name):
        features = datasets.Features({"image": datasets.Image(), "label": kind})
        table = datasets.Dataset.from_dict({"image": image, "label": labels}, features)
        table.save_to_disk(str(tmp_path / name))
        return HuggingFaceImages(str(tmp_path / name))

    data = saved([0, 1, 2], datasets.ClassLabel(names=["2", "1", "0"]), "indices")
    assert named(data) == ["2", "1", "0"]
    data = saved(["007", "7", "08"], datasets.Value("string"), "text")
    assert named(data) == ["007", "7", "08"]
    assert saved([True, False, True], datasets.Value("bool"), "bool").labels == [1, 0, 1]
    with pytest.raises(ValueError, match=r"column 'label' .* neither a name nor a whole number"):
        saved([[1], [2], [3]], datasets.Sequence(datasets.Value("int64")), "many")
    with pytest.raises(ValueError, match="label -1 is none of the 2 classes a, b"):
        saved([0, -1, 1], datasets.ClassLabel(names=["a", "b"]), "missing")


# --- captions -------------------------------------------------------------------------------------


def test_captions_are_text_and_may_be_several(tmp_path):
    """A list was written out as the text of the list, and 007 became 7."""
    url = shard(
        tmp_path / "a.tar",
        {"cls": "0", "txt": "007"},
        {"json": {"caption": ["a dog", "", None, " a puppy "], "label": 0}},
        {"json": {"caption": [], "label": 0}},
        {"json": {"caption": "a cat", "label": 0}},
        {"json": {"caption": 12, "label": 0}},
        {"json": {"caption": {"en": "x"}, "label": 0}},
    )
    for data in (WebDatasetImages(url), WebDatasetStream(url, class_names=1)):
        items = [data[i] for i in range(5)]
        assert [i["caption"] for i in items] == ["007", "a dog", "0", "a cat", "12"]
        assert [i.get("captions") for i in items] == [None, ["a dog", "a puppy"], *[None] * 3]
        with pytest.raises(CorruptPicture, match=r"caption \{'en': 'x'\} is no text"):
            data[5]


def test_hugging_face_captions_may_be_several(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [Image.new("RGB", (8, 8))] * 2, "texts": [["a dog", "a puppy"], []]}
    features = datasets.Features(
        {"image": datasets.Image(), "texts": datasets.Sequence(datasets.Value("string"))}
    )
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "d"))
    data = HuggingFaceImages(str(tmp_path / "d"), label_column=None, caption_column="texts")
    assert data[0]["captions"] == ["a dog", "a puppy"]
    assert [data[i]["caption"] for i in range(2)] == ["a dog", ""]


# --- several sets ---------------------------------------------------------------------------------


def folder(root, *classes: str) -> dict[str, object]:
    draw_pictures(root, [f"{name}/{i}.png" for name in classes for i in range(2)])
    return {"name": "folder", "root": str(root)}


def test_joined_sets_have_the_classes_of_all_by_name(tmp_path):
    """The first one's names stood for all: ants were trained as cats."""
    a, b = folder(tmp_path / "a", "cat", "dog"), folder(tmp_path / "b", "ant", "cat", "bee")
    url = shard(tmp_path / "c.tar", {"cls": "dog"}, {"cls": "emu"})
    data = make_dataset([a, {**b, "repeat": 2}, {"name": "webdataset", "urls": url}])
    assert data.class_names == ["cat", "dog", "ant", "bee", "emu"]
    of_b = ["ant"] * 2 + ["bee"] * 2 + ["cat"] * 2
    assert named(data) == ["cat"] * 2 + ["dog"] * 2 + of_b * 2 + ["dog", "emu"]
    captions = [data[i]["caption"] for i in range(len(data))]
    assert captions == named(data)  # by default the class


def test_labels_go_by_name(tmp_path):
    data = make_dataset(folder(tmp_path, "ant", "cat"))
    assert by_name(data, ["ant", "cat"]) is data
    assert [by_name(data, ["cat", "bee", "ant"])[i]["label"] for i in range(4)] == [2, 2, 0, 0]
    with pytest.raises(ValueError, match="1 classes ant, which are none of the model's 1 classes"):
        by_name(data, ["cat"])


# --- training and measuring -----------------------------------------------------------------------


@pytest.fixture
def prepare(tmp_path):
    """A generator's run, prepared: its model, training set and validation set."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def run(train, validation, conditioner=None, stopped=None, **data):
        """stopped: the model of a run that goes on."""
        spec = {
            "task": "generator",
            "output_dir": str(tmp_path / "run"),
            "tokenizer": str(tmp_path / "tokenizer"),
            "model": {"name": "gpt", "depth": 1, "dim": 32, "conditioner": conditioner},
            "data": {"train": train, "validation": validation, **data},
            "trainer": SIX_STEPS,
        }
        spec["model"]["conditioner"] = conditioner or {"name": "class"}
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        if stopped is not None:
            stopped.save_pretrained(tmp_path / "run")
            (tmp_path / "run/checkpoints").mkdir()
            (tmp_path / "run/checkpoints/step-0000003.ckpt").touch()
        config = from_mapping(ExperimentConfig, spec)
        objective, training, validating, _ = prepare_run(config)
        return objective.model, training, validating

    return run


def tokenized(spec, output, tmp_path) -> dict[str, str]:
    arguments = ["tokenize", str(tmp_path / "tokenizer"), json.dumps(spec), str(output)]
    assert main([*arguments, "--device", "cpu"]) == 0
    return {"name": "tokens", "path": str(output)}


@pytest.mark.parametrize(
    ("balance", "expected"), [(0.0, [1, 3, 12]), (0.5, [3, 6, 12]), (1.0, [12, 12, 12])]
)
def test_balance_repeats_the_samples_of_small_classes(balance, expected):
    """sqrt(1 * 12) is 3.5, which rounds to 3, and sqrt(3 * 12) is 6; class 1 has no sample."""
    labels = torch.tensor([3, 2, 3, 0, 2, 3, 2, *[3] * 9])
    indices = torch.tensor(balanced(labels, balance))
    assert labels[indices].bincount().tolist() == [expected[0], 0, *expected[1:]]
    times = indices.bincount(minlength=len(labels))
    assert times.min() >= 1  # every sample is there
    for label in (0, 2, 3):  # and those of a class about as often
        assert times[labels == label].max() - times[labels == label].min() <= 1


def test_balance_prefers_no_place_in_a_class():
    """The first ones by name were those that were repeated."""
    labels = torch.tensor([0] * 60 + [1] * 100)
    more = torch.tensor(balanced(labels, 1.0)).bincount()[:60] == 2
    assert more.sum() == 40
    assert 8 < more[:30].sum() < 32


def test_a_generator_sees_small_classes_as_often(tmp_path, prepare):
    names = [*(f"common/{i}.png" for i in range(6)), "rare/0.png", "rare/1.png"]
    draw_pictures(tmp_path / "data", names)
    spec = {"name": "folder", "root": str(tmp_path / "data")}
    for balance, expected in {0.0: [6, 2], 1.0: [6, 6]}.items():
        _, training, validating = prepare(spec, spec, class_balance=balance)
        seen = torch.tensor([training[i]["label"] for i in range(len(training))])
        assert seen.bincount().tolist() == expected
        assert len(validating) == 8


def test_a_tokenizer_has_no_balance():
    spec = {"task": "tokenizer", "output_dir": "run", "model": {"name": "flextok"}}
    spec |= {"data": {"train": {"name": "emoji"}, "class_balance": 0.5}, "trainer": SIX_STEPS}
    with pytest.raises(ConfigError, match=r"data\.class_balance=0\.5 is for generators"):
        from_mapping(ExperimentConfig, spec)


def test_validation_labels_count_in_the_classes_of_training(tmp_path, prepare):
    """A validation set without bees numbered cats as bees, and its loss chose the checkpoint."""
    train = folder(tmp_path / "tr", "ant", "bee", "cat")
    fewer = folder(tmp_path / "va", "ant", "cat")
    url = shard(tmp_path / "va.tar", {"cls": "cat"}, {"cls": "ant"})
    named_shards = {"urls": url, "class_names": ["cat", "ant"]}
    sets = [
        (fewer, ["ant", "ant", "cat", "cat"]),
        (tokenized(fewer, tmp_path / "va-tokens", tmp_path), ["ant", "ant", "cat", "cat"]),
        ({"name": "webdataset", "urls": url}, ["cat", "ant"]),
        ({"name": "webdataset_stream", **named_shards}, ["cat", "ant"]),
        ([fewer, {"name": "webdataset", "urls": url}], ["ant", "ant", "cat", "cat", "cat", "ant"]),
    ]
    for source in (train, tokenized(train, tmp_path / "tr-tokens", tmp_path)):
        for validation, expected in sets:
            model, training, validating = prepare(source, validation)
            assert model.metadata["class_names"] == training.class_names == ["ant", "bee", "cat"]
            assert model.config.conditioner["num_classes"] == 3
            assert named(training) == ["ant", "ant", "bee", "bee", "cat", "cat"]
            labels = [int(validating[i]["label"]) for i in range(len(validating))]
            assert [["ant", "bee", "cat"][label] for label in labels] == expected


def test_a_generator_does_not_go_on_over_other_classes(tmp_path, prepare):
    """Its rows of classes stood for others from then on, without a word."""
    train, more = folder(tmp_path / "a", "ant", "cat"), folder(tmp_path / "b", "ant", "bee", "cat")
    model, _, _ = prepare(train, train)
    for data in (more, tokenized(more, tmp_path / "more", tmp_path)):
        run = tmp_path / "run"
        with pytest.raises(ValueError, match="generator of the 2 classes ant, cat, and the data"):
            prepare(data, data, stopped=model)
        assert not (run / "tokens").exists()
    assert prepare(train, train, stopped=model)[0].metadata["class_names"] == ["ant", "cat"]
    assert len(prepare(more, more)[1]) == 6  # another run


def test_classes_that_do_not_fit_are_refused_where_they_matter(tmp_path, prepare):
    train, other = folder(tmp_path / "a", "ant", "cat"), folder(tmp_path / "b", "cat", "dog")
    draw_pictures(tmp_path / "flat", ["0.png", "1.png"])
    flat = {"name": "folder", "root": str(tmp_path / "flat")}
    for data, conditioner, message in (
        ((train, other), {}, "the 1 classes dog, which are none of the model's 2 classes ant, cat"),
        ((train, other), {}, r"^data\.validation: .*, or set data\.validation=null$"),
        ((train, flat), {}, "the 1 classes unlabelled, which are none"),
        ((train, [train, other]), {}, "the 1 classes dog, which are none"),
        (([train, flat], train), {}, r"some pictures of data.train have no class \(unlabelled\)"),
        ((train, train), {"num_classes": 1}, "num_classes=1, but the data has the 2 classes ant"),
        ((train, train), {"num_classes": 3}, "num_classes=3, but the data has the 2 classes ant"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(*data, {"name": "class", **conditioner})
        assert not (tmp_path / "run").exists()  # before anything is tokenized
    # an unconditional generator has no classes
    assert len(prepare([train, flat], other, {"name": "none"})[2]) == 4


def test_measuring_asks_for_the_datas_classes_by_name(tmp_path):
    generator = tiny_gpt(conditioner={"name": "class", "num_classes": 3})
    generator.metadata["class_names"] = ["bee", "cat", "ant"]
    data = make_dataset(folder(tmp_path / "va", "ant", "cat"))
    options = Options(labels="data", num_samples=4)
    cells = [Cell(8, num_steps=1)]
    asked: list[int] = []
    generate = generator.generate
    generator.generate = lambda cond, **o: (asked.extend(cond.tolist()), generate(cond, **o))[1]
    evaluate(generator, data, cells, options, tokenizer=tiny_tokenizer())
    assert asked == [2, 2, 1, 1]
    generator.metadata["class_names"] = ["bee", "cat", "emu"]
    with pytest.raises(ValueError, match=r"the 1 classes ant, .* \(labels=balanced\)"):
        evaluate(generator, data, cells, options, tokenizer=tiny_tokenizer())


def test_accents_are_the_same_in_both_forms_of_unicode(tmp_path):
    """An archive that was made on a Mac decomposes them."""
    composed, apart = "\u00e9l\u00e9phant", "e\u0301le\u0301phant"
    draw_pictures(tmp_path / "mac", [f"{apart}/1.png", f"{composed}/2.png", "owl/1.png"])
    found = ImageFolder(tmp_path / "mac")
    assert found.class_names == ["owl", composed]
    assert found.labels.count(1) == 2
    assert ImageFolder(tmp_path / "mac", class_names=["owl", apart]).labels.count(1) == 2
    assert renumbering([apart], ["owl", composed]) == [1]
    assert class_label(composed, ["owl", apart]) == 1
    with pytest.raises(ValueError, match="unknown class"):
        class_label("ele\u0301phant", ["owl", composed])


@pytest.mark.parametrize("key", ["tokenizer", "token_variants"])
def test_what_a_generator_alone_reads_is_refused_elsewhere(tmp_path, key):
    """It was accepted, and did nothing."""
    spec = {"task": "tokenizer", "output_dir": str(tmp_path), "model": {}, "trainer": SIX_STEPS}
    data = {"train": {"name": "emoji"}}
    spec |= {"tokenizer": "x", "data": data} if key == "tokenizer" else {"data": {**data, key: 5}}
    with pytest.raises(ConfigError, match=f"{key}=.*leave it out"):
        from_mapping(ExperimentConfig, spec)
