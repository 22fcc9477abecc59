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


def gaussian_error(solver, steps, shift, predicts="velocity"):
    """The solver's error on the flow from N(0.7, 0.4^2), whose solution is known: the state keeps
    its distance from the mean in standard deviations. Through x0 the velocity has no value at 0."""
    mean, std, z = 0.7, 0.4, 1.3

    def velocity(x, t):
        t, x = t.double(), x.double()
        variance = ((1 - t) * std) ** 2 + t**2
        x0 = mean + (1 - t) * std**2 / variance * (x - (1 - t) * mean)
        return path.velocity_of(x0, x, t) if predicts == "x0" else (x - (1 - t) * x0) / t - x0

    times = path.shift_times(path.linear_times(steps).double(), shift)
    x0 = solver(velocity, torch.tensor([z], dtype=torch.float64), times)
    return abs(x0.item() - (mean + std * z))


@pytest.mark.parametrize(
    ("solver", "shift", "steps", "order"),
    [
        (euler, 1.0, 64, 1),
        (euler, 3.0, 64, 1),
        (heun, 1.0, 32, 2),
        (heun, 3.0, 64, 2),
        (ab2, 1.0, 32, 2),
        (ab2, 0.5, 32, 2),
    ],
)
def test_halving_the_steps_divides_the_error_by_two_to_the_order(solver, shift, steps, order):
    for predicts in ("velocity", "x0"):
        few, many = (gaussian_error(solver, n, shift, predicts) for n in (steps, 2 * steps))
        assert few / many == pytest.approx(2**order, rel=0.1)


def test_eight_second_order_steps_are_nearer_to_the_solution_than_eight_of_euler():
    for shift in (0.5, 1.0, 3.0):
        errors = {name: gaussian_error(solver, 8, shift) for name, solver in SOLVERS.items()}
        assert errors["heun"] < errors["euler"]
        assert errors["ab2"] < errors["euler"] / 2


@pytest.mark.parametrize("name", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_no_solver_evaluates_at_the_last_time(name, steps):
    """heun did, where a head that predicts x0 has no velocity: 10.8 dB against Euler's 19.1."""
    seen = []

    def velocity(x, t):
        seen.append(float(t))
        return path.velocity_of(torch.full_like(x, 0.25), x, t)

    x0 = SOLVERS[name](velocity, torch.ones(1, 3), path.linear_times(steps))
    torch.testing.assert_close(x0, torch.full((1, 3), 0.25))
    assert min(seen) == 1 / steps
    assert len(seen) == (2 * steps - 1 if name == "heun" else steps)


@pytest.mark.parametrize("space", ["velocity", "x0"])
@pytest.mark.parametrize("predicts", ["velocity", "x0"])
def test_a_perfect_prediction_has_no_error_at_any_time(predicts, space, generator):
    """Below t = 0.05 the prediction was clamped and its target was not."""
    x0, noise = torch.randn(2, 7, 3, 4, 4, generator=generator)
    t = torch.tensor([0.0, 1e-4, 0.01, 0.03, 0.05, 0.5, 1.0])
    target = x0 if predicts == "x0" else path.velocity_target(x0, noise)
    assert path.flow_error(target, target, t, predicts, space) == 0
    # and an error of x0 is t times one of the velocity, bounded near the data
    error = torch.randn(x0.shape, generator=generator)
    found = path.flow_error(target + error, target, t, predicts, space)
    factor = {"velocity": {"x0": t}, "x0": {"velocity": 1 / t.clamp_min(0.05)}}
    weight = factor[predicts].get(space, torch.ones_like(t)) ** 2
    expected = (error.square().mean(dim=(1, 2, 3)) * weight).mean()
    torch.testing.assert_close(found, expected)


def test_velocity_and_x0_say_the_same(generator):
    x0, noise = torch.randn(2, 4, 3, 4, 4, generator=generator)
    t = torch.tensor([0.01, 0.03, 0.5, 1.0])
    x_t, v = path.interpolate(x0, noise, t), path.velocity_target(x0, noise)
    torch.testing.assert_close(path.velocity_of(x0, x_t, t), v, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(path.x0_of(v, x_t, t), x0, atol=1e-6, rtol=1e-5)


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
