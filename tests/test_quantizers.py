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


@pytest.mark.parametrize("levels", [[], [1, 8], [8.0]])
def test_fsq_refuses_bad_levels(levels):
    with pytest.raises(ValueError, match="levels="):
        FSQ(levels)


def test_fsq_refuses_the_wrong_width():
    with pytest.raises(ValueError, match="2 levels"):
        FSQ([8, 8])(torch.zeros(1, 4, 3))
