"""The KL-VAE: its ways to fit memory, its files, its standardised latents."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL

from flextok.autoencoder import Autoencoder, AutoencoderConfig
from flextok.convert import current_config
from flextok.pipeline import load
from flextok.tokenizers import FlexTok, FlexTokConfig
from flextok.tokenizers.base import component
from flextok.vae import KLVAE, VAES, kl_settings, with_sizes

SMALL = {"block_channels": (32, 32, 32), "layers_per_block": 1, "channels": 4}  # f4


def pair(**options) -> tuple[KLVAE, KLVAE]:
    plain, other = KLVAE(**SMALL).eval(), KLVAE(**SMALL, **options).eval()
    other.load_state_dict(plain.state_dict())
    return plain, other


@torch.no_grad()
def test_slicing_is_the_same_numbers_a_picture_at_a_time():
    plain, sliced = pair(slicing=True)
    batches = []
    sliced.vae.decoder.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    latents = plain.encode(images)
    assert torch.allclose(sliced.encode(images), latents, atol=1e-5)
    assert torch.allclose(sliced.decode(latents), plain.decode(latents), atol=1e-5)
    assert batches == [1, 1, 1]


@torch.no_grad()
def test_tiling_cuts_large_pictures_only():
    plain, tiled = pair(tiling=True, sample_size=64)
    sides = []
    tiled.vae.decoder.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    small, large = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 40, 40)
    assert torch.equal(tiled.decode(small), plain.decode(small))
    assert sides == [16]
    pictures = tiled.decode(large)
    assert pictures.shape == (1, 3, 160, 160)
    assert len(sides) > 4
    assert max(sides) == 16, sides  # no larger than a tile's latents
    assert pictures.isfinite().all()
    with pytest.raises(AssertionError):  # each tile's attention and norms see the tile only
        torch.testing.assert_close(pictures, plain.decode(large))


def standard() -> Autoencoder:
    torch.manual_seed(0)
    config = AutoencoderConfig(16, 4, [8, 16], 1, 2, latents_mean=[1, 2, 3, 4], latents_std=[2] * 4)
    return Autoencoder(config).eval()


@torch.no_grad()
def test_a_folder_of_diffusers_gives_sizes_and_standardised_latents(tmp_path, images):
    model = standard()
    model.save_pretrained(tmp_path)
    vae = KLVAE(**kl_settings(tmp_path)).eval()
    vae.load_weights()
    mean, std = torch.tensor([1, 2, 3, 4]).view(-1, 1, 1), 2
    latents = model.posterior(images)[0]
    assert torch.allclose(vae.encode(images), (latents - mean) / std, atol=1e-6)
    assert torch.allclose(vae.decode(vae.encode(images)), model.decode(latents), atol=1e-5)


def test_a_tokenizer_has_the_sizes_of_its_vae_and_keeps_them_without_its_folder(tmp_path, images):
    standard().save_pretrained(tmp_path / "vae")
    sizes = {"image_size": 16, "num_registers": 4, "encoder_depth": 1, "decoder_depth": 1}
    spec = {"name": "kl", "weights": str(tmp_path / "vae"), "sample_posterior": False}
    model = FlexTok(FlexTokConfig(**sizes, vae=spec)).eval()
    assert model.config.vae["latents_std"] == [2] * 4
    model.vae.load_weights()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "vae")
    loaded = FlexTok.from_pretrained(tmp_path / "model")
    assert loaded.codes_id == model.codes_id
    assert torch.equal(loaded.vae.encode(images), model.vae.encode(images))


@pytest.mark.parametrize("spec", [{}, {"scaling_factor": 0.5}, {"channels": 16, "slicing": True}])
def test_models_of_before_keep_their_vae_and_codes_id(tmp_path, spec):
    """Their VAE is FlexTok's where they state no sizes, whatever lies under the name they state."""
    standard().save_pretrained(tmp_path)
    saved = {"vae": {"name": "kl", "weights": str(tmp_path), **spec}}
    vae = with_sizes(current_config("flextok", saved)["vae"])
    assert vae == {"channels": 16, **saved["vae"]}
    scaled = {k: v for k, v in spec.items() if k == "scaling_factor"}
    assert component(VAES, vae, unused="weights slicing") == {"name": "kl", **scaled}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
        ({"latent_channels": None}, "lacks latent_channels"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, changes, message):
    standard().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        kl_settings(tmp_path)
    with pytest.raises(ValueError, match="no VAE at"):
        kl_settings(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, r"latents_mean=\[1, 2, 3, 4\].*state model.vae.latents_mean="),
        ({}, {"latents_mean": (0.0,) * 4}, r"latents_std=\[2, "),
        ({"latents_mean": None, "latents_std": None, "scaling_factor": 0.5}, {}, "factor=0.5"),
        ({"shift_factor": 0.1}, {}, "shift_factor=0.1"),
    ],
)
def test_weights_whose_scaling_the_options_do_not_state_are_refused(
    tmp_path, changes, options, message
):
    """They were taken as if they had none, from a hub or where a size was stated."""
    standard().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {"block_channels": (8, 16), "layers_per_block": 1, "norm_groups": 2, "channels": 4}
    with pytest.raises(ValueError, match=message):
        KLVAE(**sizes, **options).load_weights(str(tmp_path))
    other = {"scaling_factor": 2.0, "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
    if "shift_factor" not in changes:
        KLVAE(**sizes, **other).load_weights(str(tmp_path))  # what is stated counts


@torch.no_grad()
def test_a_saved_autoencoder_gives_equal_outputs_in_diffusers(tmp_path, images):
    model = standard()
    model.metadata["step"] = 3
    model.save_pretrained(tmp_path)
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert torch.equal(theirs(images).sample, model.decode(model.posterior(images)[0]))
    assert theirs.config.latents_mean == [1, 2, 3, 4]
    ours = load(tmp_path)
    assert ours.config == model.config
    assert ours.metadata == model.metadata
    theirs.save_pretrained(tmp_path / "theirs")  # and what diffusers writes is one of ours
    again = Autoencoder.from_pretrained(tmp_path / "theirs")
    assert again.config == model.config
    assert torch.equal(again.posterior(images)[1], model.posterior(images)[1])
