import pytest
import torch

from flextok.draws import BatchDraws
from flextok.objectives.nested_dropout import NESTED_DROPOUT, NestedDropout
from flextok.tokenizers.base import prefix_lengths


def frequencies(name, total, draws=64_000):
    u = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([NESTED_DROPOUT[name](x, total) for x in u.tolist()])
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


def test_sqrt_pow2_doubles_with_each_second_power():
    share = frequencies("sqrt_pow2", 256)
    assert share[1].item() == pytest.approx(share[4].item() / 2, abs=0.01)
    assert share[64].item() == pytest.approx(share[256].item() / 2, abs=0.01)
    assert share[prefix_lengths(256)].sum().item() == pytest.approx(1)
    assert share[256].item() == pytest.approx(16 / sum(2 ** (i / 2) for i in range(9)), abs=0.01)


def test_none_keeps_everything():
    assert frequencies("none", 7)[7] == 1


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_prefix_lengths_end_with_the_limit(limit, expected):
    assert prefix_lengths(limit) == expected


@pytest.mark.parametrize("name", list(NESTED_DROPOUT))
def test_the_ends_of_the_unit_interval_stay_in_range(name):
    for u in (0.0, 1 - 2**-53):
        assert 1 <= NESTED_DROPOUT[name](u, 5) <= 5


def lengths(name, total, batch, strata, generator, rows=None):
    order, groups = NestedDropout(name, total, strata).groups(BatchDraws(batch, generator, rows))
    assert sorted(order) == list(range(batch))
    assert [g.rows.start for g in groups] == [0, *(g.rows.stop for g in groups[:-1])]
    if strata is not None:
        assert all(g.keep.tolist() == [g.length] * (g.rows.stop - g.rows.start) for g in groups)
    return [length for group in groups for length in group.keep.tolist()]


@pytest.mark.parametrize(
    ("batch", "strata"), [(16, 8), (9, 9), (10, 4), (3, 8), (1, 8), (12, None)]
)
def test_a_batch_has_short_and_long_lengths_in_their_shares(batch, strata, generator):
    """So every batch, and over many batches each length as often as its sampler says."""
    counts = torch.zeros(17)
    for _ in range(2000):
        drawn = lengths("uniform", 16, batch, strata, generator)
        assert len(drawn) == batch
        assert drawn == sorted(drawn)
        # distances on the circle of u: no two different ones are nearer than a stratum
        found = sorted(set(drawn))
        assert len(found) == min(batch, strata or batch)
        gaps = [b - a for a, b in zip(found, [*found[1:], found[0] + 16], strict=True)]
        assert min(gaps) >= 16 // (strata or 16)
        assert max(gaps) <= 32 // len(found) or batch == 1
        counts += torch.bincount(torch.tensor(drawn), minlength=17)
    torch.testing.assert_close(
        counts[1:] / counts.sum(), torch.full((16,), 1 / 16), atol=0.02, rtol=0
    )


def test_one_stratum_is_one_length_a_batch(generator):
    drawn = [lengths("pow2", 256, 16, 1, generator) for _ in range(100)]
    assert all(len(set(batch)) == 1 for batch in drawn)
    assert {batch[0] for batch in drawn} == {1, 2, 4, 8, 16, 32, 64, 128, 256}


@pytest.mark.parametrize("strata", [8, None])
def test_shares_of_a_batch_have_the_lengths_of_the_whole(strata):
    def drawn(rows):
        rng = torch.Generator().manual_seed(3)
        return lengths("uniform", 256, len(rows), strata, rng, rows)

    whole = drawn(range(32))
    shares = [drawn(range(start, start + 8)) for start in range(0, 32, 8)]
    assert sorted(length for share in shares for length in share) == whole
    if strata:  # equal work
        assert all(share == shares[0] for share in shares)


def test_equal_generators_give_equal_lengths_and_move_on():
    one, two = (torch.Generator().manual_seed(7) for _ in range(2))
    first, second = (lengths("uniform", 256, 8, 8, one) for _ in range(2))
    assert first != second
    assert [lengths("uniform", 256, 8, 8, two) for _ in range(2)] == [first, second]
    torch.manual_seed(1)
    of_pytorch = [lengths("uniform", 256, 8, 8, None) for _ in range(2)]
    torch.manual_seed(1)
    assert [lengths("uniform", 256, 8, 8, None) for _ in range(2)] == of_pytorch
    assert of_pytorch[0] != of_pytorch[1]


def test_what_a_row_draws_belongs_to_its_number(generator):
    state = generator.get_state()
    whole = BatchDraws(6, generator)
    device = torch.device("cpu")
    expected = [whole(torch.randn, (2, 3), device), whole(torch.rand, (), device)]
    assert len(expected[1].unique()) == 6
    for rows in ([4, 1], torch.tensor([5]), range(2, 5)):
        generator.set_state(state)
        some = BatchDraws(len(rows), generator, rows)
        for drawn in expected:
            shape, sampler = tuple(drawn.shape[1:]), torch.randn if drawn.ndim > 1 else torch.rand
            assert torch.equal(some(sampler, shape, device), drawn[torch.as_tensor(list(rows))])
    with pytest.raises(ValueError, match="2 row numbers for 3 rows"):
        BatchDraws(3, generator, [0, 1])
