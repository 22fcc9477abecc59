"""`flextok sample`: which pictures are asked for, checked before the work, done batch by batch."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok import __version__
from flextok.cli import main
from flextok.cli import sample as command
from flextok.cli.options import DECODING, SAMPLING
from flextok.cli.sample import class_labels
from flextok.config import load_experiment
from flextok.generators.ar import GenerateOptions
from flextok.generators.conditioning import NoConditioner
from flextok.generators.maskgit import MaskGITOptions
from flextok.pipeline import remember_tokenizer
from flextok.schema import ConfigError
from flextok.tokenizers import FlexTok
from flextok.tokenizers.decoding import DecodeOptions

FEW = ("--steps", "1", "--guidance-scale", "1", "--num-tokens", "8")


@pytest.fixture
def folder(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    encoder = {"name": "bytes", "dim": 16, "depth": 1, "num_heads": 2, "max_length": 24}
    for name, conditioner in [
        ("text", {"name": "text", "encoder": encoder}),
        ("free", {"name": "none"}),
        ("class", {"name": "class", "num_classes": 4}),
    ]:
        gpt = tiny_gpt(conditioner=conditioner)
        if name == "class":
            gpt.metadata["class_names"] = ["1", "2", "3", "10"]
        remember_tokenizer(gpt, tmp_path / name, tokenizer, str(tmp_path / "tokenizer"))
        gpt.save_pretrained(tmp_path / name)
    return tmp_path


def sample(folder, model, *arguments):
    output = folder / "out" / "grid.png"
    return main(["sample", str(folder / model), *map(str, arguments), "--output", str(output)])


def labels(known, asked=None, number=1):
    found, names = class_labels(known, len(known), asked, number)
    return found.tolist(), names


def test_the_default_classes_are_taken_by_index():
    """Folders 1, 2, 3, 10 once gave the classes 0, 0, 2, 3: their indices were read as names."""
    assert labels(["1", "2", "3", "10"]) == ([0, 1, 2, 3], ["1", "2", "3", "10"])
    many = [str(i) for i in range(40, 0, -1)]
    found, names = labels(many)
    assert found == [i * 40 // 16 for i in range(16)]
    assert names == [many[i] for i in found]
    assert class_labels([], 3, None, 2)[0].tolist() == [0, 0, 1, 1, 2, 2]  # no names stored


def test_a_class_is_meant_by_its_name_then_by_its_number_then_none():
    assert labels(["1", "2", "3", "10"], ["1", "10", "0", "none"])[0] == [0, 3, 0, -1]
    assert labels(["none", "null", "1"], ["none", "null", "1", "0", ""])[0] == [0, 1, 2, 0, -1]
    for wrong in ("4", "-1", "\u00b2", "nones"):
        with pytest.raises(ValueError, match=f"unknown class {wrong!r}"):
            labels(["1", "2", "3", "10"], [wrong])


@pytest.mark.parametrize("asked", [["--classes", "cat"], ["--classes"], ["--prompt", "cat"]])
def test_an_unconditional_generator_refuses_conditions(folder, capsys, asked):
    assert sample(folder, "free", *asked, *FEW) == 1
    assert "generates without a condition" in capsys.readouterr().err
    assert sample(folder, "free", "--num-samples", 3, *FEW) == 0
    with pytest.raises(ValueError, match="no condition"):
        NoConditioner(4).prepare(["a cat"], torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--seed", str(2**63)], f"seed={2**63} must be"),
        (["--num-samples", "100000000"], "num_samples=100000000 must be at least 1"),
        (["--num-samples", "9000"], "do not fit one grid"),
        (["--steps", "1000000000"], "num_steps=1000000000 must be"),
        (["--class-guidance", "nan"], "class_guidance=nan must be a finite number"),
        (["--temperature", "1e-45"], "temperature=1e-45 must be a number from 0.0001"),
        (["--top-p", "nan"], "top_p=nan must be"),
        (["--output", "x.pgn"], "x.pgn must end in .png"),
        (["--output", "."], "--output . is a folder"),
    ],
)
def test_numbers_and_names_are_checked_before_the_work(
    folder, capsys, arguments, said, monkeypatch
):
    def work(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr("flextok.generators.GPT.new_caches", work)
    code = main(["sample", str(folder / "class"), *arguments])
    assert code == 1
    assert said in capsys.readouterr().err


def test_pictures_are_decoded_in_batches_and_the_grid_is_bounded(folder, monkeypatch, capsys):
    """A whole folder was one batch."""
    draw_pictures(folder / "pictures", [f"{i}.png" for i in range(7)])
    sizes, decode = [], FlexTok.decode

    @functools.wraps(decode)
    def spy(self, indices, *args, **options):
        sizes.append(len(indices))
        return decode(self, indices, *args, **options)

    monkeypatch.setattr(FlexTok, "decode", spy)
    monkeypatch.setattr(command, "BATCH", 3)
    assert sample(folder, "tokenizer", "--images", folder / "pictures", *FEW) == 0
    assert sizes == [3, 3, 1]
    in_batches = Image.open(folder / "out" / "grid.png").tobytes()
    monkeypatch.setattr(command, "BATCH", 64)
    assert sample(folder, "tokenizer", "--images", folder / "pictures", *FEW) == 0
    assert Image.open(folder / "out" / "grid.png").tobytes() == in_batches
    monkeypatch.setattr(command, "MOST_PIXELS", 2 * 128**2 * 6)
    assert sample(folder, "tokenizer", "--images", folder / "pictures", *FEW) == 1
    assert "7 images do not fit one grid of 6" in capsys.readouterr().err


def test_an_unreadable_picture_does_not_cost_the_report(folder, capsys):
    draw_pictures(folder / "pictures", ["a.png", "c.png"])
    (folder / "pictures" / "b.png").write_text("no picture")
    place = ("--json", folder / "facts.json")
    assert sample(folder, "tokenizer", "--images", folder / "pictures", *FEW, *place) == 1
    assert "1 of 3 images could not be read" in capsys.readouterr().err
    found = json.loads((folder / "facts.json").read_text())
    assert (found["count"], found["unreadable"], found["num_tokens"]) == (2, 1, [8])
    assert Path(found["output"]).is_file()


@pytest.mark.parametrize("option", ["--images", "--data"])
def test_no_grid_is_written_over_a_picture_that_it_shows(folder, capsys, option):
    draw_pictures(folder / "out", ["grid.png", "b.png"])
    before = (folder / "out" / "grid.png").read_bytes()
    assert sample(folder, "tokenizer", option, folder / "out", *FEW) == 1
    assert f"{folder / 'out' / 'grid.png'} would be written over" in capsys.readouterr().err
    assert (folder / "out" / "grid.png").read_bytes() == before


def test_a_picture_is_drawn_several_times_side_by_side(folder, capsys):
    draw_pictures(folder / "pictures", ["a.png", "b.png"])
    asked = ("--images", folder / "pictures", "--steps", "2", "--num-tokens", "1", "8")
    assert sample(folder, "tokenizer", *asked, "--num-samples", "3") == 0
    shown = Image.open(folder / "out" / "grid.png")
    assert sample(folder, "tokenizer", *asked) == 0
    once = Image.open(folder / "out" / "grid.png")
    assert shown.height == once.height, "a row a picture"
    cell = (once.width - shown.width) / (3 - 7)  # columns: 1 token, 8 tokens, the original
    assert cell > 100
    columns = [
        np.asarray(shown.crop((int(i * cell), 20, int((i + 1) * cell), shown.height)))
        for i in range(6)
    ]
    assert all((a != b).any() for a, b in itertools.pairwise(columns)), "another noise for each"


def test_pictures_of_many_prompts_are_written_as_they_are_made(folder, monkeypatch, capsys):
    """All were made and kept before the first was written."""
    (folder / "prompts.txt").write_text("\n".join(f"heart {i}" for i in range(70)))
    monkeypatch.setattr(command, "MOST_PIXELS", 128**2 * 5)

    decode = FlexTok.decode

    @functools.wraps(decode)
    def failing(self, indices, *args, **options):
        if len(indices) != 64:
            raise ValueError("the second batch failed")
        return decode(self, indices, *args, **options)

    asked = ("--prompts-file", folder / "prompts.txt", *FEW)
    monkeypatch.setattr(FlexTok, "decode", failing)
    assert sample(folder, "text", *asked) == 1
    assert len(list((folder / "out").glob("grid-*.png"))) == 64
    monkeypatch.setattr(FlexTok, "decode", decode)
    assert sample(folder, "text", *asked) == 0
    assert len(list((folder / "out").glob("grid-*.png"))) == 70
    assert "shows the first 5 of 70 images" in capsys.readouterr().out


def test_the_options_are_fields_of_what_they_choose():
    fields = [
        {f.name for f in dataclasses.fields(kind)} for kind in (GenerateOptions, MaskGITOptions)
    ]
    assert set(SAMPLING) <= fields[0] | fields[1]
    assert set(DECODING) == {f.name for f in dataclasses.fields(DecodeOptions)} - {"guidance"}


def test_the_version_and_the_models_are_listed(releases, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"flextok {__version__}"
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("emoji", "emoji-class", "emoji-few-step", "emoji-one-step", "emoji-text")
    ]
    assert "tokenizer" in lines[0]
    assert "by class" in lines[1]


def test_a_folder_alone_is_a_data_set(picture_folder, tmp_path):
    """data.train=/folder was "must be a list"."""
    path = "configs/quickstart_tokenizer.yaml"
    config = load_experiment(path, [f"data.train={picture_folder}"])
    assert config.data.train == {"name": "folder", "root": str(picture_folder)}
    with pytest.raises(ConfigError, match=r"validation='/nowhere/at all' is no folder"):
        load_experiment(path, ["data.validation=/nowhere/at all"])


def test_what_was_sampled_is_json_too(tmp_path, monkeypatch, capsys):
    """sample was the one command that finds something out and did not write it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("tokenizer")
    gpt = tiny_gpt()
    remember_tokenizer(gpt, Path("gpt"), tokenizer, "tokenizer")
    gpt.save_pretrained("gpt")
    facts = Path("facts.json")
    arguments = ["--classes", "3", "1", "--num-tokens", "1", "8", "--seed", "5"]
    assert main(["sample", "gpt", *arguments, "--json", "facts.json"]) == 0
    found = json.loads(facts.read_text())
    assert (found["num_tokens"], found["seed"], len(found["conditions"])) == ([1, 8], 5, 2)
    assert Path(found["output"]).is_file()
    assert main(["sample", "tokenizer", "--json", "facts.json"]) == 1
    assert "does not state which images it belongs to" in capsys.readouterr().err
    data = ["--data", "emoji:validation", "--limit", "3", "--num-tokens", "1"]
    assert main(["sample", "tokenizer", *data, "--json", "facts.json"]) == 0
    assert json.loads(facts.read_text())["count"] == 3


def test_prompts_are_the_captions_that_somebody_wrote(folder, capsys):
    """Images without any were of the prompt "unlabelled", and a damaged one ended all."""
    draw_pictures(folder / "bare", ["a.png", "b.png", "c.png"])
    assert sample(folder, "text", "--data", folder / "bare") == 1
    assert f"no image of --data {folder / 'bare'} has a caption" in capsys.readouterr().err
    (folder / "bare" / "b.txt").write_text("a heart")
    (folder / "bare" / "c.png").write_bytes(b"no picture")
    facts = folder / "facts.json"
    assert sample(folder, "text", "--data", folder / "bare", "--json", facts) == 0
    assert json.loads(facts.read_text())["conditions"] == ["a heart"]


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("tokenizer", "--temperature 0.5", "leave --temperature out"),
        ("tokenizer", "--top-k 3", "leave --top-k out"),
        ("tokenizer", "--text-guidance 2", "leave --class-guidance out"),
        ("tokenizer", "--generator-steps 2", "leave --generator-steps out"),
        ("tokenizer", "--tokenizer emoji", "leave --tokenizer out"),
        ("class", "--classes 1 --limit 3", "not from images: leave --limit out"),
        ("text", "--prompt heart --limit 3", "not from images: leave --limit out"),
    ],
)
def test_options_that_do_nothing_are_refused(folder, capsys, model, given, message):
    images = []
    if model == "tokenizer":
        draw_pictures(folder / "pictures", ["a.png"])
        images = ["--images", folder / "pictures"]
    assert sample(folder, model, *images, *given.split()) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_images_beside_a_grid_are_written_over_no_others(folder, capsys):
    """The numbered images of prompts took the place of the data set's own."""
    for name in ("a-1", "a-2", "b"):
        draw_pictures(folder / "out", [f"{name}.png"])
        (folder / "out" / f"{name}.txt").write_text(name)
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    asked = ["sample", str(folder / "text"), *FEW, "--output", str(folder / "out" / "a.png")]
    for data in (["--data", str(folder / "out")], ["--prompt", "x"]):
        assert main([*asked, *data]) == 1
        assert "a-1.png" in (told := capsys.readouterr().err)
        assert "would be written over: name another --output" in told
    assert {path: path.read_bytes() for path in (folder / "out").iterdir()} == before
    asked[-1] = str(folder / "out" / "c.png")
    for _ in range(2):  # its own it may replace
        assert main([*asked, "--prompt", "x", "y"]) == 0


def test_a_grid_is_no_longer_than_its_format_takes(folder, capsys, monkeypatch):
    monkeypatch.setattr(command.viz, "LONGEST_SIDE", {"WEBP": 3 * 136 + 20})
    output = folder / "out" / "grid.webp"
    asked = ["sample", str(folder / "text"), *FEW, "--output", str(output), "--prompt", *"abcd"]
    assert main(asked) == 0
    assert "which shows the first 3 of 4 images" in capsys.readouterr().out
    assert Image.open(output).height <= 3 * 136 + 20
    asked = ["sample", str(folder / "class"), *FEW, "--output", str(output)]
    assert main(asked) == 1
    assert "4 images do not fit one grid of 3" in capsys.readouterr().err
