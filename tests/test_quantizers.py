import pytest
import torch

from flextok.quantizers import FSQ


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


@pytest.mark.parametrize("levels", [5, 8, 9])
def test_ifsq_makes_a_normal_nearly_uniform(generator, levels):
    z = torch.randn(1, 50_000, 1, generator=generator)
    plain, even, whole = (
        use_of_levels(z, levels, **options)
        for options in ({}, {"gain": 0.8}, {"gain": 0.8, "full_ends": True})
    )
    assert even[1:-1].std() / even[1:-1].mean() < plain[1:-1].std() / plain[1:-1].mean()
    assert even[[0, -1]].mean() < 0.6 * even[1:-1].mean()  # the outer levels are half as wide
    entropies = [-(p * p.log2()).sum() for p in (plain, whole)]
    assert entropies[0] + 0.01 < entropies[1]
    assert whole.min() > 0.5 * whole.max()


def test_ifsq_is_the_sigmoid_bound_and_its_indices_mean_the_same(generator):
    z = torch.randn(1, 1000, 2, generator=generator) * 30
    fsq = FSQ([5, 7], gain=0.8)
    half = torch.tensor([2.0, 3.0]) * (1 + fsq.eps)
    torch.testing.assert_close(fsq.bound(z), half * (2 * torch.sigmoid(1.6 * z) - 1))
    for other in (FSQ([8, 7, 2], gain=0.8), FSQ([8, 7, 2], gain=0.8, full_ends=True)):
        spread = torch.tensor([[[1.5], [30.0]]])  # where all levels are in use, and saturated
        z = torch.randn(4000, 2, 3, generator=generator) * spread
        codes, indices, _ = other(z)
        assert [len(c.unique()) for c in codes.unbind(-1)] == [8, 7, 2]
        assert torch.equal(FSQ([8, 7, 2]).indices_to_codes(indices), codes)
    with pytest.raises(ValueError, match="gain=0"):
        FSQ([8], gain=0)


@pytest.mark.parametrize("levels", [[], [1, 8], [8.0]])
def test_fsq_refuses_bad_levels(levels):
    with pytest.raises(ValueError, match="levels="):
        FSQ(levels)


def test_fsq_refuses_the_wrong_width():
    with pytest.raises(ValueError, match="2 levels"):
        FSQ([8, 8])(torch.zeros(1, 4, 3))
