"""Editing in token space: what each function keeps, what it changes and what it refuses."""

import re

import pytest
import torch
from helpers.models import TITOK, tiny_gpt, tiny_tokenizer

from flextok.editing import interpolate, mix, prefix_distances, vary
from flextok.generators import MaskGIT, MaskGITConfig
from flextok.quantizers import FSQ, VQ
from flextok.tokenizers import TiTok, TiTokConfig


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def indices(generator):
    return torch.randint(200, (5, 8), generator=generator)


def test_a_mix_has_the_first_tokens_of_one_image_and_the_others_of_another(indices):
    first, second = indices[:2], indices[2:4]
    for k in range(9):
        mixed = mix(first, second, k)
        assert torch.equal(mixed[:, :k], first[:, :k])
        assert torch.equal(mixed[:, k:], second[:, k:])
    assert torch.equal(mix(first[:, :3], second, 3), mix(first, second, 3)), "a prefix is enough"
    one = mix(indices[0].tolist(), second, 2)  # one image for all
    assert torch.equal(one, torch.cat([mix(indices[0], row, 2) for row in second]))


def test_interpolation_goes_from_one_image_to_the_other_through_nearest_codes(tokenizer, indices):
    first, second = indices[0], indices[1]
    weights = [0, 0.2, 0.5, 0.8, 1]
    between = interpolate(tokenizer, first, second, weights)
    assert torch.equal(between[0], first)
    assert torch.equal(between[-1], second)
    a, b, middle = (tokenizer.codes_of(one)[0] for one in (first, second, between[2]))
    codes = tokenizer.quantizer.indices_to_codes(torch.arange(200))
    for j, code in enumerate((a + b) / 2):
        nearest = (codes - code).norm(dim=1).min()
        torch.testing.assert_close((middle[j] - code).norm(), nearest)
    there = prefix_distances(tokenizer, between, first[None])[:, 0]
    back = prefix_distances(tokenizer, between, second[None])[:, 0]
    assert (there.diff() > 0).all()
    assert (back.diff() < 0).all()
    assert torch.equal(interpolate(tokenizer, second, first, [0.8])[0], between[1])
    assert torch.equal(interpolate(tokenizer, first[:3], second[:3], weights), between[:, :3])


def test_interpolation_in_a_learned_codebook():
    torch.manual_seed(0)
    titok = TiTok(TiTokConfig(**TITOK)).eval()
    first, second = torch.randint(32, (2, 6))
    between = interpolate(titok, first, second, [0, 0.4, 1])
    assert torch.equal(between[[0, 2]], torch.stack([first, second]))
    codes = titok.codes_of(first)[0].lerp(titok.codes_of(second)[0], 0.4)
    codes = torch.nn.functional.normalize(codes, dim=1)
    every = titok.quantizer.indices_to_codes(torch.arange(32))
    assert torch.equal(between[1], torch.cdist(codes, every).argmin(dim=1))


@pytest.mark.parametrize("quantizer", [FSQ([8, 5, 2]), VQ(50, 4), VQ(50, 4, l2_norm=False)])
def test_every_code_is_its_own_nearest(quantizer, generator):
    indices = torch.arange(quantizer.codebook_size)
    codes = quantizer.indices_to_codes(indices)
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    far = quantizer.codes_to_indices(torch.randn(20, 7, codes.shape[1], generator=generator) * 9)
    assert far.shape == (20, 7)
    assert far.min() >= 0
    assert far.max() < quantizer.codebook_size


def test_variations_keep_the_first_tokens_and_differ_in_the_others(indices):
    gpt = tiny_gpt()
    made = vary(gpt, 3, indices[0, :2], 6, seed=4)
    assert made.shape == (6, 8)
    assert (made[:, :2] == indices[0, :2]).all()
    assert len(made.unique(dim=0)) == 6
    assert torch.equal(vary(gpt, 3, indices[0, :2], 2, seed=4), made[:2]), "each by its number"
    assert not torch.equal(vary(gpt, 3, indices[0, :2], 6, seed=5), made)
    # the first of all is what generate() makes of the prefix, whatever the condition's form
    assert torch.equal(vary(gpt, ["3"], indices[:1, :2], 6, seed=4), made)
    assert torch.equal(vary(gpt, torch.tensor([3]), indices[:1, :2], 6, seed=4), made)
    likeliest = gpt.generate(3, prefix=indices[:1, :2], temperature=0)
    assert torch.equal(vary(gpt, 3, indices[0, :2], 1, sampling={"temperature": 0}), likeliest)
    assert vary(gpt, 3, indices[0, :2], 1, num_tokens=5).shape == (1, 5)
    assert torch.equal(vary(gpt, 3, indices[0], 2), indices[:1].expand(2, -1)), "nothing to draw"


def test_the_nearest_images_share_the_first_tokens(tokenizer, indices):
    others = indices.clone()
    others[:, 4:] = (others[:, 4:] + 100) % 200  # the same first four
    near = prefix_distances(tokenizer, indices, others, 4)
    assert (near.diagonal() == 0).all()
    assert torch.equal(near.argmin(dim=1), torch.arange(5))
    assert torch.equal(near, near.T)
    a, b = tokenizer.codes_of(indices[:1]), tokenizer.codes_of(others[1:2])
    expected = (a - b).square().mean().sqrt()
    torch.testing.assert_close(prefix_distances(tokenizer, indices, others)[0, 1], expected)


def test_what_does_not_fit_is_named(tokenizer, indices):
    maskgit = MaskGIT(MaskGITConfig(vocab_size=200, num_tokens=8, depth=1, dim=16, num_heads=2))
    for call, said in [
        (lambda: mix(indices, indices, 9), "k=9 must be a whole number from 0 to 8"),
        (lambda: mix(indices[:2], indices[:3], 1), "2 and 3 images"),
        (lambda: interpolate(tokenizer, indices[0], indices[1], [2]), "weights=2 must be"),
        (lambda: interpolate(tokenizer, indices[0], indices[1, :2], [0]), "(1, 8) and (1, 2)"),
        (lambda: interpolate(tokenizer, indices[0] + 200, indices[1], [0]), "indices span"),
        (lambda: prefix_distances(tokenizer, indices, indices, 9), "k=9 must be"),
        (lambda: vary(tiny_gpt(), 3, indices[0], 0), "number=0 must be"),
        (lambda: vary(tiny_gpt(), 3, indices, 1), "prefix has shape (5, 8)"),
        (lambda: vary(tiny_gpt(), 3, indices[0], 1, num_tokens=4), "k at most 4"),
        (lambda: vary(maskgit, 3, indices[0], 1), "a maskgit does not generate its tokens in"),
    ]:
        with pytest.raises(ValueError, match=re.escape(said)):
            call()
