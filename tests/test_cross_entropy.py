"""The cross-entropy that a CPU computes some rows at a time is torch's, with torch's gradient."""

import pytest
import torch
import torch.nn.functional as F

from flextok.nn import cross_entropy as module
from flextok.nn.cross_entropy import cross_entropy, pays_by_rows


def reference(head, x, truth, weights, smoothing):
    logits = head(x).to(weights.dtype)
    nats = F.cross_entropy(logits, truth, reduction="none", label_smoothing=smoothing)
    return (nats * weights).sum() / weights.sum(), logits.argmax(dim=1)


def inputs(rows=23, dim=8, codes=50, dtype=torch.float32, bias=True):
    torch.manual_seed(rows)
    head = torch.nn.Linear(dim, codes, bias=bias).to(dtype)
    x = (3 * torch.randn(rows, dim, dtype=dtype)).requires_grad_()
    with torch.no_grad():  # a third of them are right
        any_index = torch.randint(codes, (rows,))
        truth = torch.where(torch.rand(rows) < 0.3, head(x).argmax(dim=1), any_index)
    weights = torch.rand(rows, dtype=dtype)
    weights[1::5] = 0
    return head, x, truth, weights


def gradients(loss, head, x):
    return torch.autograd.grad(2 * loss, [x, *head.parameters()])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("at_once", [8 * 50, 9 * 50, 23 * 50, 2**21])
def test_loss_and_gradient_are_torchs_however_many_rows_at_once(
    smoothing, bias, at_once, monkeypatch
):
    monkeypatch.setattr(module, "LOGITS", at_once)
    head, x, truth, weights = inputs(dtype=torch.float64, bias=bias)
    loss, guesses = cross_entropy(head, x, truth, weights, smoothing, guess=True)
    wanted, wanted_guesses = reference(head, x, truth, weights, smoothing)
    torch.testing.assert_close(loss, wanted)
    assert guesses.equal(wanted_guesses)
    assert 0 < (guesses == truth).sum() < len(truth)
    torch.testing.assert_close(gradients(loss, head, x), gradients(wanted, head, x))


def test_in_bf16_it_is_no_less_exact_than_torchs(monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 16 * 1000)
    head, x, truth, weights = inputs(100, 32, 1000)
    exact = gradients(reference(head, x, truth, weights, 0.1)[0], head, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = cross_entropy(head, x, truth, weights, 0.1)
        plain, _ = reference(head, x, truth, weights, 0.1)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    both = (gradients(loss, head, x), gradients(plain, head, x))
    for ours, theirs, right in zip(*both, exact, strict=True):
        assert ours.dtype == right.dtype
        assert (ours - right).norm() < 1.2 * (theirs - right).norm() + 1e-6


@pytest.mark.parametrize("frozen", ["x", "weight", "all but bias", "all"])
def test_only_what_learns_has_a_gradient(frozen):
    head, x, truth, weights = inputs()
    x.requires_grad_(frozen not in ("x", "all but bias", "all"))
    head.weight.requires_grad_(frozen not in ("weight", "all but bias", "all"))
    head.bias.requires_grad_(frozen != "all")
    loss, _ = cross_entropy(head, x, truth, weights)
    wanted, _ = reference(head, x, truth, weights, 0.0)
    torch.testing.assert_close(loss, wanted)
    assert loss.requires_grad == (frozen != "all")
    learning = [p for p in (x, head.weight, head.bias) if p.requires_grad]
    if learning:
        ours, theirs = (torch.autograd.grad(one, learning) for one in (loss, wanted))
        torch.testing.assert_close(ours, theirs)


def test_without_gradients_the_loss_is_the_same():
    head, x, truth, weights = inputs()
    with torch.no_grad():
        loss, _ = cross_entropy(head, x, truth, weights)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(head, x, truth, weights, 0.0)[0])


def test_the_largest_logits_do_not_overflow():
    head, x, truth, weights = inputs()
    loss, _ = cross_entropy(head, 1e4 * x, truth, weights)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, head, x))


def test_a_large_head_is_left_to_torch(monkeypatch):
    """Of which a few rows at a time would add up the whole gradient too often."""
    head, x, truth, weights = inputs()
    assert pays_by_rows(head, x)
    assert not pays_by_rows(head.bfloat16(), x)  # whose gradient is too coarse to add up
    monkeypatch.setattr(module, "LOGITS", 7 * 50)
    head.float()
    assert not pays_by_rows(head, x)
    loss, guesses = cross_entropy(head, x, truth, weights, 0.1)
    wanted, _ = reference(head, x, truth, weights, 0.1)
    torch.testing.assert_close(loss, wanted)
    assert guesses is None
    torch.testing.assert_close(gradients(loss, head, x), gradients(wanted, head, x))


def test_parts_that_the_head_does_not_use_have_no_gradient():
    head, x, truth, weights = inputs()
    head.unused = torch.nn.Parameter(torch.ones(3))
    loss, _ = cross_entropy(head, x, truth, weights)
    loss.backward()
    assert head.unused.grad is None
    assert head.weight.grad.abs().sum() > 0


def test_an_excluded_index_costs_nothing():
    head, x, truth, weights = inputs()
    with torch.no_grad():
        head.bias[49] = -torch.inf
    truth = truth.clamp_max(48)
    loss, _ = cross_entropy(head, x, truth, weights)
    torch.testing.assert_close(loss, reference(head, x, truth, weights, 0.0)[0])
    assert loss.isfinite()
