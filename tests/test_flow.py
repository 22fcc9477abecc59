import math

import pytest
import torch

from flextok.flow import path
from flextok.flow.guidance import apg, cfg, within
from flextok.flow.solvers import SOLVERS, ab2, euler, heun


def test_the_path_runs_from_data_to_noise(generator):
    x0, noise = torch.randn(2, 3, 4, 4, 4, generator=generator).unbind(0)[0:2]
    zero, one = torch.zeros(len(x0)), torch.ones(len(x0))
    torch.testing.assert_close(path.interpolate(x0, noise, zero), x0)
    torch.testing.assert_close(path.interpolate(x0, noise, one), noise)
    half, step = torch.full_like(zero, 0.5), 1e-3
    slope = path.interpolate(x0, noise, half + step) - path.interpolate(x0, noise, half)
    target = path.velocity_target(x0, noise)
    torch.testing.assert_close(slope / step, target, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", list(path.TIME_SAMPLERS))
def test_time_samplers_stay_in_range_and_are_monotone(name):
    u = torch.linspace(0, 1, 101)
    t = path.TIME_SAMPLERS[name](u)
    assert t.min() >= 0
    assert t.max() <= 1
    steps = t.diff()
    if name == "thick_tailed":  # two branches
        steps = steps[11:]
    assert (steps >= 0).all() or (steps <= 0).all()  # an invertible change of variable


def test_logit_normal_has_the_stated_moments(generator):
    t = path.logit_normal(torch.rand(20_000, generator=generator), mean=0.5, std=0.8)
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logits.std().item() == pytest.approx(0.8, abs=0.03)


def test_the_mean_of_logit_normal_shifts_the_times():
    u = torch.linspace(0.01, 0.99, 99)
    shifted = path.shift_times(path.logit_normal(u, std=1.5), 3.0)
    torch.testing.assert_close(path.logit_normal(u, mean=math.log(3), std=1.5), shifted)


def test_thick_tails_are_a_share_of_uniform_times():
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = path.thick_tailed(u, mean=1.0, std=0.5, uniform_share=0.2)
    for below in torch.tensor([0.02, 0.1, 0.5, 0.75, 0.97]):
        normal = torch.special.ndtr((torch.logit(below) - 1.0) / 0.5)
        mixture = float(0.8 * normal + 0.2 * below)  # the share of times below it
        assert (t < below).float().mean() == pytest.approx(mixture, abs=1e-3)
    with pytest.raises(ValueError, match=r"uniform_share=1\.5"):
        path.thick_tailed(u, uniform_share=1.5)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_solvers_are_exact_on_a_constant_velocity(name, generator):
    noise, v = torch.randn(2, 5, generator=generator)
    x0 = SOLVERS[name](lambda x, t: v, noise, path.linear_times(3))
    torch.testing.assert_close(x0, noise - v)


def test_heun_is_second_order_and_euler_first():
    """dx/dt = x from t=1 to 0 ends at x(1)/e: halving the step divides the error by 4, and by 2."""

    def error(solver, steps):
        x0 = solver(lambda x, t: x.double(), torch.ones(1), path.linear_times(steps).double())
        return abs(x0.item() - 1 / math.e)

    assert error(euler, 16) / error(euler, 32) == pytest.approx(2, rel=0.05)
    assert error(heun, 8) / error(heun, 16) == pytest.approx(4, rel=0.1)
    assert error(ab2, 16) / error(ab2, 32) == pytest.approx(4, rel=0.1)
    assert error(ab2, 8) < error(euler, 8) / 4  # for the same number of velocities


def test_ab2_stays_second_order_on_unequal_steps():
    def error(steps):
        times = path.shift_times(path.linear_times(steps).double(), 2.0)
        return abs(ab2(lambda x, t: x.double(), torch.ones(1), times).item() - 1 / math.e)

    assert error(32) / error(64) == pytest.approx(4, rel=0.15)


def test_linear_times_go_from_noise_to_data():
    assert path.linear_times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = path.shift_times(path.linear_times(4), 3.0)
    torch.testing.assert_close(shifted, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    with pytest.raises(ValueError, match="time_shift=0"):
        path.shift_times(path.linear_times(4), 0)
    with pytest.raises(ValueError, match="num_steps=0"):
        path.linear_times(0)


def fields(generator):
    c, u = torch.randn(2, 3, 2, 4, 4, generator=generator)
    return c, u, (lambda x, t: c), (lambda x, t: u)


@pytest.mark.parametrize("rule", [cfg, apg])
def test_scale_one_is_the_conditional_velocity(rule, generator):
    c, _, cond, null = fields(generator)
    x, t = torch.zeros_like(c), torch.tensor(0.5)
    assert torch.equal(rule(cond, null, 1.0)(x, t), c)
    torch.testing.assert_close(rule(cond, null, lambda t: 1.0)(x, t), c)


@pytest.mark.parametrize("rule", [cfg, apg])
def test_outside_its_interval_guidance_costs_nothing(rule, generator):
    c, u, cond, _ = fields(generator)
    calls = []

    def null(x, t):
        calls.append(float(t))
        return u

    guided = rule(cond, null, within(3.0, 0.3, 0.8))
    outputs = {t: guided(c, torch.tensor(t)) for t in (1.0, 0.75, 0.5, 0.25)}
    assert calls == [0.75, 0.5]
    assert [torch.equal(v, c) for v in outputs.values()] == [True, False, False, True]
    with pytest.raises(ValueError, match=r"guidance_interval=\[0.8, 0.3\]"):
        within(3.0, 0.8, 0.3)


def test_cfg_extrapolates(generator):
    c, u, cond, null = fields(generator)
    v = cfg(cond, null, 3.0)(c, torch.tensor(1.0))
    torch.testing.assert_close(v, u + 3 * (c - u))


def test_apg_update_is_bounded_and_orthogonal_to_the_conditional(generator):
    c, _, cond, null = fields(generator)
    update = apg(cond, null, 5.0, norm_threshold=0.7)(c, torch.tensor(1.0)) - c
    norms = update.flatten(1).norm(dim=1)
    assert (norms <= 4 * 0.7 + 1e-5).all()
    inner = (update * c).flatten(1).sum(dim=1)
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-4, rtol=0)


def test_apg_forgets_between_solves(generator):
    c, _, cond, null = fields(generator)
    x, t = torch.zeros_like(c), torch.tensor(1.0)
    guided = apg(cond, null, 5.0, norm_threshold=1e3)
    first, second = guided(x, t), guided(x, t)
    assert not torch.equal(first, second)  # momentum
    assert torch.equal(apg(cond, null, 5.0, norm_threshold=1e3)(x, t), first)
