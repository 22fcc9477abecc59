import pytest
import torch

from flextok.tokenizers.nested_dropout import NESTED_DROPOUT, powers_of_two


def frequencies(name, total, draws=64_000):
    u = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    keep = NESTED_DROPOUT[name](u, total)
    assert keep.min() >= 1
    assert keep.max() <= total
    return torch.bincount(keep, minlength=total + 1) / draws


def test_uniform():
    share = frequencies("uniform", 16)
    torch.testing.assert_close(share[1:], torch.full((16,), 1 / 16), atol=0.01, rtol=0)


def test_pow2_is_uniform_over_powers():
    share = frequencies("pow2", 256)
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    torch.testing.assert_close(share[powers], torch.full((9,), 1 / 9), atol=0.01, rtol=0)
    assert share[powers].sum().item() == pytest.approx(1)


def test_uniform_pow2_halves_with_each_power():
    share = frequencies("uniform_pow2", 256)
    for k, expected in {256: 0.5, 128: 0.25, 64: 0.125, 32: 1 / 16}.items():
        assert share[k].item() == pytest.approx(expected, abs=0.01)


def test_none_keeps_everything():
    assert frequencies("none", 7)[7] == 1


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_powers_of_two_end_with_the_limit(limit, expected):
    assert powers_of_two(limit).tolist() == expected


@pytest.mark.parametrize("name", list(NESTED_DROPOUT))
def test_the_ends_of_the_unit_interval_stay_in_range(name):
    keep = NESTED_DROPOUT[name](torch.tensor([0.0, 1 - 2**-24]), 5)
    assert keep.min() >= 1
    assert keep.max() <= 5
