"""The KL-VAE's ways to fit memory."""

import pytest
import torch

from flextok.vae import KLVAE

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
