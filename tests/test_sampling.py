import pytest
import torch

from flextok.generators.sampling import filtered_probabilities, sample


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
