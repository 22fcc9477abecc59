"""`shift: auto, scale: auto`: the mean and deviation of one's own pictures, not of the emoji."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.files import write_shard
from helpers.models import TINY, tiny_tokenizer
from helpers.runs import SIX_STEPS
from PIL import Image

from flextok.config import ExperimentConfig, load_experiment
from flextok.data.datasets import ImageFolder
from flextok.data.pixels import measure_pixels
from flextok.data.web import WebDatasetStream
from flextok.draws import sample_evenly
from flextok.pipeline import load
from flextok.schema import ConfigError, from_mapping
from flextok.training.plan import Assumptions, plan
from flextok.training.prepare import fill_auto
from flextok.training.run import train
from flextok.vae import IdentityVAE

AUTO = {"name": "identity", "shift": "auto", "scale": "auto"}


def gradients(folder, count=6, low=20, high=120, kind="png"):
    """Dark pictures of 24 x 16, each of them another one."""
    draws = np.random.default_rng(low)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = draws.integers(low, high, (16, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{kind}")
    return folder


def test_mean_and_deviation_are_those_of_what_the_model_sees(tmp_path):
    gradients(tmp_path)
    (tmp_path / "z.png").write_bytes(b"damaged")
    pictures = [Image.open(tmp_path / f"{i}.png").crop((4, 0, 20, 16)) for i in range(6)]
    seen = np.stack([np.asarray(p, dtype=float) for p in pictures]) / 127.5 - 1
    mean, deviation, count = measure_pixels(ImageFolder(tmp_path), 16)
    assert count == 6
    assert mean == pytest.approx(seen.mean(), abs=1e-6)
    assert deviation == pytest.approx(seen.std(), abs=1e-6)
    mean, _, count = measure_pixels(ImageFolder(tmp_path), 16, limit=2)
    assert count == 2
    assert mean == pytest.approx(seen[sample_evenly(2, 7)].mean(), abs=1e-6)
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the training pictures"):
        measure_pixels(ImageFolder(tmp_path), 16)


def test_a_stream_is_sampled_from_the_beginnings_of_its_shards(tmp_path):
    for shard in range(20):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (10 * shard,) * 3).save(buffer, "PNG")
        write_shard(tmp_path / f"{shard:02}.tar", {f"{i}.png": buffer.getvalue() for i in range(5)})
    data = WebDatasetStream(str(tmp_path / "*.tar"), label_key=None)
    mean, _, count = measure_pixels(data, 8, limit=16)
    assert count == 16
    expected = np.array([10 * i for i in sample_evenly(8, 20)]) / 127.5 - 1
    assert mean == pytest.approx(expected.mean(), abs=1e-6)


@pytest.mark.parametrize(("limit", "few"), [(32, False), (64, False), (1000, True)])
def test_shards_that_take_turns_and_small_ones_are_sampled_whole(tmp_path, limit, few):
    """Of shards that are black and white in turns the black ones alone were read, and of many small
    ones eight."""
    for shard in range(40):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (255 * (shard % 2),) * 3).save(buffer, "PNG")
        write_shard(tmp_path / f"{shard:02}.tar", {f"{i}.png": buffer.getvalue() for i in range(5)})
    data = WebDatasetStream(str(tmp_path / "*.tar"), label_key=None)
    mean, deviation, count = measure_pixels(data, 8, limit)
    assert count == (200 if few else limit)
    assert mean == pytest.approx(0, abs=0 if few else 0.51)
    assert deviation > 0.85


def experiment(folder, pictures, **model) -> ExperimentConfig:
    spec = {
        "task": "tokenizer",
        "output_dir": str(folder),
        "model": {"name": "flextok", **TINY, "vae": AUTO, **model},
        "data": {"train": {"name": "folder", "root": str(pictures)}, "batch_size": 2},
        "trainer": {**SIX_STEPS, "max_steps": 2},
    }
    return from_mapping(ExperimentConfig, spec)


def test_a_run_measures_prints_and_stores(tmp_path, caplog):
    """The emoji's numbers stood in the config that the docs name for one's own pictures."""
    caplog.set_level("INFO")
    pictures = gradients(tmp_path / "pictures")
    config = experiment(tmp_path / "run", pictures)
    mean, deviation, _ = measure_pixels(ImageFolder(pictures), 16)
    train(config)
    assert config.model["vae"] == AUTO  # the caller's config is as it was
    model = load(tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["vae"]
    assert model.config.vae == stored
    assert stored["shift"] == pytest.approx(mean, rel=5e-3)
    assert stored["scale"] == pytest.approx(1 / deviation, rel=5e-3)
    told = f"shift {stored['shift']:g}, scale {stored['scale']:g}"
    assert "pixels of 6 training images: mean" in caplog.text
    assert told in caplog.text
    images = torch.stack([tensor(pictures / f"{i}.png") for i in range(6)])
    latents = model.vae.encode(images)
    assert abs(float(latents.mean())) < 0.01
    assert float(latents.std()) == pytest.approx(1, abs=0.01)
    # continued, it keeps its numbers; data that changed are no reason to measure again
    gradients(pictures, low=150, high=250)
    config.trainer.max_steps = 3
    train(config)
    assert load(tmp_path / "run").config.vae == stored


def tensor(path) -> torch.Tensor:
    pixels = np.asarray(Image.open(path).crop((4, 0, 20, 16)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def test_a_run_that_starts_from_a_model_takes_its_numbers(tmp_path):
    pictures = gradients(tmp_path / "pictures")
    own = {"name": "identity", "shift": -0.25, "scale": 3.0}
    tiny_tokenizer(vae=own).save_pretrained(tmp_path / "teacher")
    config = experiment(tmp_path / "run", pictures)
    config.objective = {"name": "distillation", "num_steps": 1, "teacher_steps": 2}
    config.start = {"teacher": str(tmp_path / "teacher")}
    assert fill_auto(config).model["vae"] == own
    config.model["vae"] = {**own, "scale": 1.0}
    with pytest.raises(ConfigError, match=r"take \{name: identity, shift: -0.25, scale: 3.0\}"):
        train(config)


def test_one_of_both_may_be_given(tmp_path):
    pictures = gradients(tmp_path / "pictures")
    config = experiment(tmp_path / "run", pictures, vae={**AUTO, "shift": 0.5})
    filled = fill_auto(config).model["vae"]
    assert filled["shift"] == 0.5
    assert filled["scale"] > 3
    plain = experiment(tmp_path / "run", pictures, vae={"name": "identity"})
    assert fill_auto(plain) is plain


def test_pictures_of_one_colour_are_told(tmp_path):
    pictures = gradients(tmp_path / "pictures", low=7, high=8)
    with pytest.raises(ConfigError, match=r"6 training images deviate by .*: they are all of"):
        train(experiment(tmp_path / "run", pictures))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_auto_is_for_training_only(images):
    vae = IdentityVAE(shift="auto")
    for use in (vae.encode, vae.decode):
        with pytest.raises(ValueError, match="`flextok train` measures what auto stands for"):
            use(images)
    for wrong in ("aut", None, "1"):
        with pytest.raises(ValueError, match="must be a number or auto"):
            IdentityVAE(scale=wrong)


def test_the_quickstart_measures_and_every_config_uses_a_gpu_where_there_is_one():
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"):
        assert load_experiment(path).trainer.accelerator == "auto", path
    config = load_experiment("configs/quickstart_tokenizer.yaml")
    assert config.model["vae"] == AUTO
    assert plan(config, 1, Assumptions()).trained > 0
