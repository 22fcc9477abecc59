"""`flextok search`: what it writes, and what it refuses before a classifier is trained."""

import json

import pytest
from helpers.models import tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok.cli import main
from flextok.emoji.alignment import agreement
from flextok.emoji.probe import packaged_probe, read_scenes
from flextok.emoji.scenes import EmojiScenes
from flextok.pipeline import remember_tokenizer

FEW = ("--steps", "1", "--guidance-scale", "1", "--num-tokens", "2", "8", "--budget", "6")
PROMPT = ("--prompt", "a red heart", "a key above a bomb on a blue background")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 48}
    for name, conditioner in [
        ("text", {"name": "text", "encoder": encoder}),
        ("class", {"name": "class", "num_classes": 4}),
    ]:
        gpt = tiny_gpt(conditioner=conditioner)
        gpt.metadata["class_names"] = ["cat", "dog", "ox", "bee"]
        remember_tokenizer(gpt, folder / name, tokenizer, str(folder / "tokenizer"))
        gpt.save_pretrained(folder / name)
    return folder


def run(folder, model, *arguments):
    place = ("--output", str(folder / "out"), "--json", str(folder / "found.json"))
    return main(["search", str(folder / model), *map(str, arguments), *place])


@pytest.mark.parametrize("model", ["text", "tokenizer"])
def test_prompts_are_searched_for_with_the_scenes_classifier(folder, model):
    probe = folder / "probe.safetensors"
    assert run(folder, model, *PROMPT, *FEW, "--probe", probe, "--probe-steps", 2) == 0
    assert probe.exists()
    report = json.loads((folder / "found.json").read_text())
    assert report["lengths"] == [2, 8]
    assert report["decodes"] == 6
    assert [one["condition"] for one in report["found"]] == list(PROMPT[1:])
    for number, one in enumerate(report["found"], 1):
        assert len(one["indices"]) == 8
        assert len(one["path"]) == 2
        assert one["score"] < 0  # a log-probability
        assert Image.open(folder / f"out/{number}.png").size == (16, 16)
        assert Image.open(folder / f"out/{number}-tree.png").width > 3 * 64


def test_the_packages_classifier_reads_scenes_of_its_size(folder, monkeypatch):
    """A search once trained one for minutes before its first decode."""
    scenes = EmojiScenes(prompts="held_out", max_objects=2, vocabulary="basic")
    images, facts, _ = read_scenes(scenes, 64, 200)
    agreed = agreement(packaged_probe().read(images), facts)
    assert agreed.nanmean() > 0.97
    tokenizer = tiny_tokenizer(image_size=64, patch_size=16)
    tokenizer.save_pretrained(folder / "large")

    def train(*options, **more):
        raise AssertionError("a classifier was trained")

    monkeypatch.setattr("flextok.emoji.probe.train_probe", train)
    assert run(folder, "large", *PROMPT, *FEW) == 0
    with pytest.raises(AssertionError, match="was trained"):
        run(folder, "tokenizer", *PROMPT, *FEW)  # of 16 x 16 pixels


@pytest.mark.parametrize(
    "option", [("--probe", "a.safetensors"), ("--probe-steps", 3), ("--data", "emoji_scenes")]
)
def test_options_of_the_classifier_are_refused_where_there_is_none(folder, option, capsys):
    command = ("class", "--classes", "dog", "--verifier", "likelihood", *FEW, *option)
    assert run(folder, *command) == 1
    assert f"likelihood reads no scenes: leave {option[0]} out" in capsys.readouterr().err


def test_classes_are_searched_for_by_likelihood(folder, capsys):
    likely = ("--verifier", "likelihood")
    assert run(folder, "class", "--classes", "dog", 3, *likely, *FEW) == 0
    report = json.loads((folder / "found.json").read_text())
    assert [one["condition"] for one in report["found"]] == ["dog", "3"]
    assert "dog: score -" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("text", FEW, "either --prompt or --classes"),
        ("text", (*PROMPT, "--classes", "cat"), "either --prompt or --classes"),
        ("text", ("--classes", "cat"), "does not generate by class"),
        ("class", ("--classes", "cat"), "reads prompts, not --classes"),
        ("tokenizer", (*PROMPT, "--tokenizer", "x"), "is a tokenizer"),
        ("tokenizer", (*PROMPT, "--verifier", "likelihood"), "needs a GPT"),
        ("text", (*PROMPT, "--verifier", "nowhere/at-all"), "--verifier nowhere/at-all"),
        ("text", ("--prompt", "a monkey"), "names 0 of the scenes' emoji"),
        ("text", (*PROMPT, "--data", "emoji"), "must be emoji_scenes"),
        ("text", (*PROMPT, "--num-tokens", "9"), "lengths=9 must be"),
        ("text", (*PROMPT, "--num-tokens", "2", "8", "--budget", "1"), "budget=1 must be"),
    ],
)
def test_what_does_not_fit_is_named_before_the_work(
    folder, capsys, monkeypatch, model, arguments, said
):
    def work(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr("flextok.emoji.probe.train_probe", work)
    monkeypatch.setattr("flextok.cli.search.search", work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(folder, model, *arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "fault"), [("notes", "is a file"), ("a.png", "ends as an image")])
def test_an_output_that_can_be_no_folder_is_refused_before_the_model_loads(
    tmp_path, capsys, name, fault
):
    (tmp_path / "notes").write_text("mine")
    arguments = ["gone/model", "--prompt", "a red heart", "--output", str(tmp_path / name)]
    assert main(["search", *arguments]) == 1
    assert f"--output {tmp_path / name} {fault}" in capsys.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"


def test_pictures_of_others_are_not_written_over(folder, capsys, monkeypatch):
    monkeypatch.setattr("flextok.cli.search.load_token_model", lambda *_: pytest.fail("loaded"))
    place = folder / "mine"
    place.mkdir()
    Image.new("RGB", (4, 4)).save(place / "2.png")
    command = ["search", str(folder / "text"), *PROMPT, "--output", str(place)]
    assert main(command) == 1
    assert f"{place / '2.png'} is there and would be written over" in capsys.readouterr().err
