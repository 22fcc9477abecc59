import math

import pytest
import torch

from flextok.quantizers import FSQ, QUANTIZERS
from flextok.schema import ConfigError, build


@pytest.mark.parametrize("levels", [[8, 5, 5], [2], [3, 4, 2, 7], [8, 8, 8, 5, 5, 5]])
def test_fsq_round_trips_all_its_codes(levels):
    fsq = FSQ(levels)
    indices = torch.arange(fsq.codebook_size)
    codes = fsq.indices_to_codes(indices)
    assert len(codes.unique(dim=0)) == fsq.codebook_size
    # the values that the bound maps onto the codes
    level = torch.tensor(levels)
    half, offset = (level - 1) * (1 + fsq.eps) / 2, torch.where(level % 2 == 0, 0.5, 0.0)
    z = torch.atanh((codes * (level // 2) + offset) / half) - torch.atanh(offset / half)
    again, found, aux = fsq(z[None])
    assert torch.equal(found[0], indices)
    torch.testing.assert_close(again[0], codes)
    assert aux == 0


def test_fsq_any_input_lands_on_a_valid_code(generator):
    fsq = FSQ([8, 5, 3])
    codes, indices, _ = fsq(torch.randn(4, 100, 3, generator=generator) * 100)
    assert indices.min() >= 0
    assert indices.max() < fsq.codebook_size
    assert torch.equal(fsq.indices_to_codes(indices), codes)


def test_fsq_gradient_is_that_of_the_bound(generator):
    fsq = FSQ([8, 5])
    z = torch.randn(1, 6, 2, generator=generator, requires_grad=True)
    fsq(z)[0].sum().backward()
    straight = z.grad.clone()
    z.grad = None
    (fsq.bound(z) / torch.tensor([4, 2])).sum().backward()
    torch.testing.assert_close(straight, z.grad)


def test_fsq_stays_in_fp32_under_low_precision(generator):
    z = torch.randn(1, 50, 3, generator=generator)
    codes, _, _ = FSQ([8, 8, 8])(z.bfloat16())
    assert codes.dtype == torch.float32


def use_of_levels(z, levels, **options):
    """(levels,) shares of z's values, from the lowest level to the highest."""
    codes, _, _ = FSQ([levels], **options)(z)
    return codes.flatten().unique(return_counts=True)[1] / z.numel()


def entropy(shares):
    return -(shares * shares.log2()).sum()


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6, 7, 8, 9, 16, 17])
def test_ifsq_uses_all_levels_alike_for_a_standard_normal(levels):
    """The bound was shifted at even levels, so that they were used less evenly than by FSQ."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    z = torch.special.ndtri(u).float()[None, :, None]
    shares = use_of_levels(z, levels, bound="ifsq")
    torch.testing.assert_close(shares, shares.flip(0), atol=2e-4, rtol=0)  # symmetric
    lost = math.log2(levels) - entropy(shares)
    assert lost < (0.005 if levels <= 9 else 0.012)  # bits; so above 2.99 of 3 at 8 levels
    if levels > 2:
        assert entropy(shares) > entropy(use_of_levels(z, levels)) + 0.01


def test_ifsq_is_the_sigmoid_bound_and_its_indices_mean_the_same(generator):
    z = torch.randn(1, 1000, 2, generator=generator) * 30
    fsq = FSQ([5, 8], bound="ifsq")
    whole = (2 * torch.sigmoid(1.6 * z) - 1) * torch.tensor([2.5, 4.0]) * (1 - fsq.eps)
    torch.testing.assert_close(fsq.bound(z), whole - torch.tensor([0.0, 0.5]))
    spread = torch.tensor([[[1.5], [30.0]]])  # where all levels are in use, and saturated
    z = torch.randn(4000, 2, 3, generator=generator) * spread
    codes, indices, _ = FSQ([8, 7, 2], bound="ifsq")(z)
    assert [len(c.unique()) for c in codes.unbind(-1)] == [8, 7, 2]
    assert torch.equal(FSQ([8, 7, 2]).indices_to_codes(indices), codes)


def test_models_saved_with_a_gain_keep_their_indices(generator):
    z = torch.randn(1, 1000, 2, generator=generator)
    assert torch.equal(FSQ([8, 5], gain=0.8)(z)[1], FSQ([8, 5])(0.8 * z)[1])
    with pytest.raises(ConfigError, match="unknown key 'full_ends'"):
        build(QUANTIZERS, {"name": "fsq", "levels": [8], "full_ends": True}, "quantizer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0}, "gain=0"),
        ({"bound": "ifsq", "gain": 0.8}, r"gain=0\.8 .* bound='ifsq'"),
        ({"bound": "tan"}, "bound='tan' must be tanh or ifsq"),
    ],
)
def test_fsq_refuses_bounds_that_it_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        FSQ([8], **options)


@pytest.mark.parametrize("levels", [[], [1, 8], [8.0]])
def test_fsq_refuses_bad_levels(levels):
    with pytest.raises(ValueError, match="levels="):
        FSQ(levels)


def test_fsq_refuses_the_wrong_width():
    with pytest.raises(ValueError, match="2 levels"):
        FSQ([8, 8])(torch.zeros(1, 4, 3))
