import pytest
import torch

from flextok.draws import derived_generator, row_generators, uniform_steps, uniforms
from flextok.generators.sampling import filtered_probabilities, invert, pick


def sample(x, generator=None, **options):
    return pick(x, uniforms((len(x),), generator, x.device), **options)


def logits(rows=3, vocabulary=50):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 2


def test_no_filter_is_softmax():
    x = logits()
    torch.testing.assert_close(filtered_probabilities(x), x.softmax(-1))
    torch.testing.assert_close(filtered_probabilities(x, top_k=50, top_p=1.0), x.softmax(-1))


@pytest.mark.parametrize("k", [1, 7, 49])
def test_top_k_keeps_the_k_best(k):
    p = filtered_probabilities(logits(), top_k=k)
    assert ((p > 0).sum(dim=-1) == k).all()
    best = logits().topk(k, dim=-1).indices
    torch.testing.assert_close(p.gather(-1, best).sum(-1), torch.ones(3))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9])
def test_top_p_keeps_the_smallest_sufficient_set(top_p):
    full = logits().softmax(-1)
    for row, kept in zip(full, filtered_probabilities(logits(), top_p=top_p) > 0, strict=True):
        mass = row[kept].sum()
        assert kept.any()
        assert mass >= min(top_p, row.max())
        assert mass - row[kept].min() < top_p  # without its least likely member it would not do
        assert row[kept].min() >= row[~kept].max()


def test_temperature_sharpens():
    cold, warm = (filtered_probabilities(logits(), temperature=t) for t in (0.2, 2.0))
    assert (cold.max(-1).values > warm.max(-1).values).all()
    assert torch.equal(sample(logits(), temperature=0), logits().argmax(-1))


def test_samples_follow_the_probabilities():
    x = logits(1, 5).expand(40_000, -1)
    drawn = sample(x, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / len(x)
    torch.testing.assert_close(share, x[0].softmax(-1), atol=0.01, rtol=0)


def test_a_generator_for_each_row_makes_rows_independent_of_their_batch():
    def seeded(rows):
        return [torch.Generator().manual_seed(row) for row in rows]

    x = logits(6)
    together = sample(x, generator=seeded(range(6)))
    apart = torch.cat([sample(x[i : i + 1], generator=seeded([i])) for i in range(6)])
    assert torch.equal(together, apart)
    same = sample(x[:1].expand(6, -1), generator=seeded(range(6)))
    assert len(same.unique()) > 1


def test_inverting_is_exact_for_the_largest_vocabulary():
    """In float32 the cumulative sum of 64,000 probabilities is off by many of them."""
    p = (torch.randn(1, 64_000, generator=torch.Generator().manual_seed(0)) * 3).softmax(-1)
    sums = p[0].double().cumsum(0)
    for index in (0, 1, 17, 31_999, 32_000, 63_998, 63_999):
        before = sums[index - 1] if index else torch.zeros((), dtype=torch.float64)
        inside = before + p[0, index].double() * torch.tensor(
            [0.01, 0.5, 0.99], dtype=torch.float64
        )
        found = invert(p.expand(3, -1), inside / sums[-1])
        assert found.tolist() == [index] * 3


def test_evenly_spread_draws_give_each_index_its_share():
    p = filtered_probabilities(logits(1, 50), temperature=0.8, top_p=0.95)
    number = 20_000
    u = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    count = torch.bincount(invert(p.expand(number, -1), u), minlength=50)
    assert ((count - number * p[0].double()).abs() <= 1).all()


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.4}, {"temperature": 0.01}])
def test_what_a_filter_leaves_out_is_never_drawn(options):
    """Nor at the ends of [0, 1), with the indices left out at both ends of the vocabulary."""
    x = torch.tensor([[-9.0, -8.0, 2.0, 2.5, -7.0, 3.0, -9.0, -400.0]])
    p = filtered_probabilities(x, **options)
    for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-53):
        assert p[0, invert(p, torch.tensor([u], dtype=torch.float64))] > 0
    draws = torch.Generator().manual_seed(0)
    drawn = sample(x.expand(20_000, -1), generator=draws, **options)
    assert (p[0, drawn] > 0).all()


def test_a_row_takes_one_uniform_number_whatever_the_vocabulary():
    draws, counted = (torch.Generator().manual_seed(4) for _ in range(2))
    sample(logits(3, 5000), generator=draws)
    torch.rand(3, dtype=torch.float64, generator=counted)
    assert torch.equal(draws.get_state(), counted.get_state())


def test_the_first_steps_draws_do_not_depend_on_how_many_follow():
    cpu = torch.device("cpu")
    for new in (lambda: torch.Generator().manual_seed(1), lambda: row_generators(0, 6, range(3))):
        long = uniform_steps(9, 3, new(), cpu)
        assert torch.equal(uniform_steps(4, 3, new(), cpu), long[:4])
        again = new()
        parts = [uniform_steps(n, 3, again, cpu) for n in (1, 3, 5)]
        assert torch.equal(torch.cat(parts), long)
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        uniform_steps(4, 3, row_generators(0, 6, range(2)), cpu)


def test_a_seed_that_does_not_fit_64_bits_is_refused():
    assert derived_generator(-1, 5).initial_seed() != derived_generator(1, 5).initial_seed()
    with pytest.raises(ValueError, match="seed=18446744073709551616"):
        derived_generator(2**64, 5)
