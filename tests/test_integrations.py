"""Models of the package as diffusers has its own: saved and loaded by its rules, and pipelines."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import draw_pictures
from helpers.models import DRAWER, TITOK, tiny_gpt, tiny_tokenizer

import flextok
from flextok.cli import main
from flextok.images import to_image
from flextok.integrations.diffusers import (
    AutoencoderFlexTok,
    FlexTokPipeline,
    FlexTokReconstructionPipeline,
)
from flextok.pipeline import remember_tokenizer
from flextok.storage import CheckpointError
from flextok.tokenizers import FlexTok, TiTok, TiTokConfig

KL = {"name": "kl", "channels": 4, "block_channels": [8], "layers_per_block": 1, "norm_groups": 4}


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("changes", [{}, {"vae": KL}, {"drawer": DRAWER}], ids=str)
def test_an_autoencoder_saves_and_loads_by_diffusers_rules(tmp_path, images, changes):
    tokenizer = tiny_tokenizer(**changes)
    tokenizer.metadata["class_names"] = ["a", "b"]
    model = AutoencoderFlexTok.from_flextok(tokenizer)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderFlexTok"
    loaded = AutoencoderFlexTok.from_pretrained(tmp_path)
    assert not loaded.training
    assert same_weights(loaded, model)
    assert loaded.tokenizer.metadata == tokenizer.metadata
    found = loaded.encode(images)
    indices = tokenizer.encode(images)
    assert torch.equal(found.indices, indices)
    options = {"num_inference_steps": 2, "guidance_scale": 1.5}
    rng = torch.Generator()
    expected = tokenizer.decode(
        indices[:, :3], generator=rng.manual_seed(0), num_steps=2, guidance_scale=1.5
    )
    for z in (found.latents[:, :3], indices[:, :3]):
        sample = loaded.decode(z, generator=rng.manual_seed(0), **options).sample
        assert torch.equal(sample, expected)
    whole = loaded(images, generator=rng.manual_seed(0)).sample
    assert torch.equal(whole, tokenizer.decode(indices, generator=rng.manual_seed(0)))


def test_half_precision_is_asked_for_as_in_diffusers(tmp_path):
    AutoencoderFlexTok.from_flextok(tiny_tokenizer()).save_pretrained(tmp_path)
    loaded = AutoencoderFlexTok.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert loaded.dtype == torch.float16


def test_a_picture_goes_through_the_reconstruction_pipeline(tmp_path):
    draw_pictures(tmp_path, ["cat.png"], width=30, height=20)
    tokenizer = tiny_tokenizer()
    pipe = FlexTokReconstructionPipeline(AutoencoderFlexTok.from_flextok(tokenizer))
    cat, rng = str(tmp_path / "cat.png"), torch.Generator()
    how = {"num_tokens": 3, "num_inference_steps": 2}
    expected = tokenizer.decode(
        tokenizer.encode(cat)[:, :3], generator=rng.manual_seed(1), num_steps=2
    )
    (picture,) = pipe(cat, generator=rng.manual_seed(1), **how).images
    assert picture == to_image(expected[0])
    tensors = pipe(cat, generator=rng.manual_seed(1), output_type="pt", **how).images
    assert torch.allclose(tensors, (expected + 1) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="num_tokens=9"):
        pipe(cat, num_tokens=9)


@pytest.fixture
def pair(tmp_path):
    """A generator by class, beside its tokenizer."""
    tokenizer, gpt = tiny_tokenizer(decode={"num_steps": 2, "guidance_scale": 1.0}), tiny_gpt()
    gpt.metadata["class_names"] = ["cat", "dog", "cow", "hen", "fox"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    remember_tokenizer(gpt, tmp_path / "gpt", tokenizer, str(tmp_path / "tokenizer"))
    gpt.save_pretrained(tmp_path / "gpt")
    return tmp_path, tokenizer, gpt


def test_convert_writes_a_generation_pipeline(pair):
    folder, tokenizer, gpt = pair
    assert main(["convert", str(folder / "gpt"), str(folder / "out"), "--to", "diffusers"]) == 0
    pipe = FlexTokPipeline.from_pretrained(folder / "out")
    assert same_weights(pipe.transformer.model, gpt)
    rng = torch.Generator()
    made = pipe(["dog", "none"], num_tokens=4, generator=rng.manual_seed(0), output_type="np")
    rng.manual_seed(0)
    indices = gpt.generate(["dog", -1], num_tokens=4, generator=rng)
    expected = tokenizer.decode(indices, generator=rng)
    assert np.allclose(made.images, ((expected + 1) / 2).permute(0, 2, 3, 1), atol=1e-6)
    how = {"num_tokens": 4, "output_type": "np"}
    many = pipe(["dog", "none"], num_images_per_prompt=2, generator=rng.manual_seed(0), **how)
    same = pipe(["dog", "dog", "none", "none"], generator=rng.manual_seed(0), **how)
    assert np.array_equal(many.images, same.images)
    labels = torch.tensor([gpt.class_names.index("dog"), -1])
    again = pipe(labels, num_images_per_prompt=2, generator=rng.manual_seed(0), **how)
    assert np.array_equal(again.images, same.images)


def test_flextok_loads_what_diffusers_saved(pair, tmp_path, images):
    """A tokenizer, and of a pipeline the generator with its tokenizer, by any of the ways in."""
    folder, tokenizer, gpt = pair
    for name in ("tokenizer", "gpt"):
        place = str(tmp_path / f"out_{name}")
        assert main(["convert", str(folder / name), place, "--to", "diffusers"]) == 0
    for loaded in (
        flextok.load(tmp_path / "tokenizer"),
        FlexTok.from_pretrained(tmp_path / "out_gpt/autoencoder"),
    ):
        assert loaded.config == tokenizer.config
        assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert (
        flextok.load(tmp_path / "out_gpt", subfolder="autoencoder").codes_id == tokenizer.codes_id
    )
    shutil.move(tmp_path / "out_gpt", tmp_path / "moved")
    shutil.rmtree(folder / "tokenizer")
    generator = flextok.load(tmp_path / "moved")
    assert generator.class_names == gpt.metadata["class_names"]
    how = {"num_tokens": 4, "temperature": 0}
    drawn = generator.generate(["dog", "none"], **how)
    assert torch.equal(drawn, gpt.generate(["dog", "none"], **how))
    found = flextok.load_tokenizer_of(generator)
    assert torch.equal(found.encode(images), tokenizer.encode(images))
    assert main(["convert", str(tmp_path / "moved"), str(tmp_path / "ours")]) == 0
    assert same_weights(flextok.load(tmp_path / "ours"), gpt)
    config = tmp_path / "moved/transformer/config.json"
    config.write_text(config.read_text().replace('"settings"', '"setings"'))
    with pytest.raises(CheckpointError, match="holds no settings of a model"):
        flextok.load(tmp_path / "moved")


def test_what_diffusers_does_not_get_is_named(tmp_path, capsys):
    TiTok(TiTokConfig(**TITOK)).save_pretrained(tmp_path / "titok")
    for layout, message in (("diffusers", "not a titok"), ("published", "takes a FlexTok")):
        assert main(["convert", str(tmp_path / "titok"), "out", "--to", layout]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_fresh_process_loads_what_was_converted(pair):
    """Through diffusers' from_pretrained alone, from the folder alone."""
    folder, _, gpt = pair
    assert main(["convert", str(folder / "gpt"), str(folder / "out"), "--to", "diffusers"]) == 0
    for name in ("gpt", "tokenizer"):
        shutil.rmtree(folder / name)
    lines = [
        "import torch",
        "from flextok.integrations.diffusers import AutoencoderFlexTok, FlexTokPipeline",
        "vae = AutoencoderFlexTok.from_pretrained('out', subfolder='autoencoder')",
        "z = vae.encode(torch.zeros(1, 3, 16, 16)).latents",
        "print(tuple(vae.decode(z[:, :2], num_inference_steps=1).sample.shape))",
        "pipe = FlexTokPipeline.from_pretrained('out')",
        "model = pipe.transformer.model",
        "print(model.generate('dog', num_tokens=4, temperature=0).tolist())",
        "print(pipe('dog', num_tokens=2).images[0].size)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    root = str(Path(__file__).parent.parent)
    how = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": root}, "check": False}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    drawn = gpt.generate("dog", num_tokens=4, temperature=0).tolist()
    expected = ["(1, 3, 16, 16)", str(drawn), "(16, 16)"]
    assert done.stdout.splitlines() == expected, done.stderr
