import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_gpt, tiny_tokenizer
from PIL import Image

from flextok.cli import main
from flextok.pipeline import remember_tokenizer

ROOT = Path(__file__).parent.parent


@pytest.fixture
def models(tmp_path):
    tokenizer, gpt = tiny_tokenizer(), tiny_gpt()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    gpt.metadata["class_names"] = ["cats", "dogs", "cows", "hens", "bees"]
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    return tmp_path


def sample(models, *arguments) -> tuple[int, Path]:
    output = models / "out" / "grid.png"
    return main(["sample", *map(str, arguments), "--output", str(output)]), output


def test_reconstruct_named_pictures(models, picture_folder, capsys):
    one = picture_folder / "cats" / "0.png"
    code, output = sample(
        models,
        models / "tokenizer",
        "--images",
        one,
        picture_folder / "dogs",
        "--num-tokens",
        1,
        8,
        "--steps",
        1,
    )
    assert code == 0
    assert str(output) in capsys.readouterr().out
    wide = Image.open(output)
    code, _ = sample(models, models / "tokenizer", "--images", one, "--num-tokens", 1, "--steps", 1)
    small = Image.open(output)
    assert wide.height > 3 * small.height  # four rows against one
    assert wide.width > small.width


def test_the_same_seed_draws_the_same_picture(models):
    def draw(seed):
        _, output = sample(
            models,
            models / "tokenizer",
            "--data",
            "emoji:validation",
            "--limit",
            2,
            "--steps",
            2,
            "--seed",
            seed,
        )
        return output.read_bytes()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_generate_by_class(models):
    code, output = sample(
        models,
        models / "gpt",
        "--classes",
        "dogs",
        4,
        "none",
        "--num-samples",
        2,
        "--steps",
        1,
        "--num-tokens",
        1,
        4,
        "--temperature",
        0.8,
        "--top-k",
        20,
        "--class-guidance",
        2,
    )
    assert code == 0
    assert Image.open(output).height > 6 * 128


def test_bad_pictures_are_skipped_and_counted(models, picture_folder, caplog, capsys):
    broken = picture_folder / "broken.png"
    broken.write_bytes(b"nothing")
    good = picture_folder / "cats" / "0.png"
    code, _ = sample(
        models,
        models / "tokenizer",
        "--images",
        broken,
        picture_folder / "gone.png",
        good,
        "--steps",
        1,
    )
    assert code == 0
    assert "2 so far" in caplog.text
    assert "gone.png" in caplog.text
    code, _ = sample(models, models / "tokenizer", "--images", broken)
    assert code == 1
    assert "none of the pictures could be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tokenizer", [], "either --images FILE ... or --data SET"),
        ("tokenizer", ["--data", "nowhere"], "neither a folder nor"),
        ("tokenizer", ["--data", "emoji:test"], "split='test'"),
        (
            "tokenizer",
            ["--data", "emoji", "--num-tokens", "9"],
            r"--num-tokens 9 must be in [1, 8]",
        ),
        ("tokenizer", ["--data", "emoji", "--limit", "0"], "limit 0"),
        ("tokenizer", ["--data", "emoji", "--classes", "1"], "has no --classes"),
        ("tokenizer", ["--data", "emoji", "--device", "abacus"], "--device abacus"),
        ("gpt", ["--classes", "unicorns"], "unknown class 'unicorns'; known: cats, dogs"),
        ("gpt", ["--classes", "5"], "unknown class '5'"),
        ("gpt", ["--images", "x.png"], "makes pictures from --classes"),
        ("gpt", ["--num-samples", "0"], "--num-samples 0"),
        ("nothing/there/at/all", [], "no model at"),
    ],
)
def test_mistakes_are_told_in_one_line(models, capsys, model, arguments, message):
    code, _ = sample(models, models / model, *arguments)
    error = capsys.readouterr().err.strip()
    assert code == 1
    assert message in error
    assert "Traceback" not in error


def test_sweep_prints_a_table_and_writes_json(models, picture_folder, capsys):
    report = models / "report" / "psnr.json"
    code = main(
        [
            "sweep",
            str(models / "tokenizer"),
            "--data",
            str(picture_folder),
            "--steps",
            "1",
            "--num-tokens",
            "1",
            "4",
            "--json",
            str(report),
            "--batch-size",
            "4",
        ]
    )
    assert code == 0
    assert "PSNR" in capsys.readouterr().out
    results = json.loads(report.read_text())["results"]
    assert [(r["num_tokens"], r["count"]) for r in results] == [(1, 6), (4, 6)]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_the_scripts_explain_themselves(script):
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage" in done.stdout
