from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from vpae import flow
from vpae.flow import FOUR_STEP_TIMES, TimeLaw
from vpae.sampling import euler_sigmas

MEAN, STD = 1.5, 0.4


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_velocity(x, t):
    """E[noise - x0 | x_t] for data N(MEAN, STD^2)."""
    t = flow.expand_time(t, x)
    excess = x - (1 - t) * MEAN
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * excess - MEAN


def test_read_outs_invert_the_path():
    x0, eps = noise(5, 2, 3, 2, 2), noise(5, 2, 3, 2, 2, seed=1)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, v = flow.interpolate(x0, eps, t), flow.velocity_target(x0, eps)
    torch.testing.assert_close(flow.x0_from_velocity(x_t, v, t), x0)
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[-1], eps[-1])


def test_velocity_is_the_derivative_of_the_path():
    x0, eps, t, h = noise(3, 4), noise(3, 4, seed=1), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), 1e-6
    slope = (flow.interpolate(x0, eps, t + h) - flow.interpolate(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, flow.velocity_target(x0, eps), atol=1e-8, rtol=1e-8)


def test_each_sample_has_its_own_time():
    x0, eps, t = noise(2, 2, 2, 2, 2), noise(2, 2, 2, 2, 2, seed=1), torch.tensor([0.25, 0.75])
    together = flow.interpolate(x0, eps, t)
    for i in range(2):
        torch.testing.assert_close(together[i], (1 - t[i]) * x0[i] + t[i] * eps[i], check_dtype=False)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    cond, uncond = torch.tensor([2.0]), torch.tensor([1.0])
    assert [float(flow.guide(cond, uncond, w)) for w in (0.0, 1.0, 5.0)] == [1.0, 2.0, 6.0]


def test_shift_of_times():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(flow.shift_time(u, 1.0), u)
    shifted = flow.shift_time(u, 5.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > u[1:-1]).all()
    torch.testing.assert_close(flow.unshift_time(shifted, 5.0), u)
    assert flow.shift_time(0.5, 3.0) == 0.75


def test_four_step_list_is_the_uniform_one_under_shift_5():
    assert pytest.approx([flow.shift_time(u, 5.0) for u in (1.0, 0.75, 0.5, 0.25)]) == list(FOUR_STEP_TIMES)


@pytest.mark.parametrize(
    "law",
    [
        TimeLaw(),
        TimeLaw(low=0.9),
        TimeLaw(low=0.02, high=0.98, shift=5.0),
        TimeLaw(high=0.4, shift=0.3),
        TimeLaw("logit_normal"),
        TimeLaw("logit_normal", mean=-0.7, std=1.6, shift=3.0),
        TimeLaw("logit_normal", low=0.1, high=0.6, mean=0.5, std=0.8, shift=3.0),
    ],
    ids=str,
)
def test_quantile_function_against_rejection_sampling(law):
    rng = np.random.default_rng(0)
    u = rng.random(400_000)
    if law.kind == "logit_normal":
        u = 1 / (1 + np.exp(-(law.mean + law.std * rng.standard_normal(len(u)))))
    t = law.shift * u / (1 + (law.shift - 1) * u)
    t = np.sort(t[(t >= law.low) & (t <= law.high)])
    q = np.linspace(0.001, 0.999, 999)
    ours = law.quantile(torch.from_numpy(q))
    assert ours.dtype == torch.float32
    reached = np.searchsorted(t, ours.double().numpy()) / len(t)
    assert np.abs(reached - q).max() < 2.5 / np.sqrt(len(t))  # Kolmogorov: exceeded once in 10^5


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_quantiles_span_exactly_the_interval(kind):
    law = TimeLaw(kind, low=0.02, high=0.98, shift=5.0)
    t = law.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
    assert t.diff().min() > 0
    torch.testing.assert_close(t[[0, -1]], torch.tensor([0.02, 0.98]))
    assert TimeLaw(kind, low=0.3, high=0.3).quantile(torch.rand(3, dtype=torch.float64)).tolist() == pytest.approx(
        [0.3] * 3
    )


def test_a_law_that_reaches_the_ends_stays_finite():
    law = TimeLaw("logit_normal", shift=5.0)
    assert law.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "wrong", [{"kind": "normal"}, {"low": 0.6, "high": 0.4}, {"high": 1.1}, {"low": -0.1}, {"shift": 0.0}, {"std": 0.0}]
)
def test_impossible_laws_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)) if "low" not in wrong else "low"):
        TimeLaw(**wrong)


def test_euler_transports_noise_to_the_data_sample_by_sample():
    eps = noise(2000, 1)
    exact = MEAN + STD * eps  # the flow of a Gaussian is affine
    errors = []
    for steps in (100, 200):
        sigmas = torch.linspace(1, 0, steps + 1).tolist()
        x = flow.euler_sample(gaussian_velocity, eps, sigmas)
        errors.append((x - exact).abs().max())
    assert errors[1] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)  # first order
    assert x.mean() == pytest.approx(MEAN, abs=0.03) and x.std() == pytest.approx(STD, rel=0.03)


def test_euler_is_exact_for_a_straight_path_at_any_grid():
    x0, eps = noise(3, 2, 2, 2, 2), noise(3, 2, 2, 2, 2, seed=1)
    seen = []

    def velocity(x, t):
        seen.append(t)
        return eps - x0

    torch.testing.assert_close(flow.euler_sample(velocity, eps, [1.0, 0.7, 0.1, 0.0]), x0)
    assert [t.tolist() for t in seen] == [[1.0] * 3, [0.7] * 3, [0.1] * 3]


def test_one_step_sample_is_noise_minus_velocity():
    eps = noise(3, 2, 2, 2, 2)
    asked = []

    def velocity(x, t):
        asked.append(t.tolist())
        return 0.3 * x + 1

    assert torch.equal(flow.renoise_sample(velocity, eps), eps - (0.3 * eps + 1))
    assert asked == [[1.0] * 3]


def test_renoising_keeps_the_law_of_a_perfect_one_step_student():
    asked, drawn = [], []

    def velocity(x, t):  # of the map that takes x_t along the flow to its end
        asked.append(float(t[0]))
        t = flow.expand_time(t, x)
        end = MEAN + STD * (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2).sqrt()
        return (x - end) / t

    def draw(i):
        drawn.append(i)
        return noise(100_000, 1, seed=10 + i)

    eps = noise(100_000, 1)
    x = flow.renoise_sample(velocity, eps, FOUR_STEP_TIMES, draw)
    assert asked == list(FOUR_STEP_TIMES) and drawn == [1, 2, 3]
    assert x.mean() == pytest.approx(MEAN, abs=0.005) and x.std() == pytest.approx(STD, rel=0.01)
    last = torch.corrcoef(torch.stack([x.flatten(), draw(3).flatten()]))[0, 1]
    first = torch.corrcoef(torch.stack([x.flatten(), eps.flatten()]))[0, 1]
    assert last > 0.9 and first.abs() < 0.05  # each step really mixed in its own noise


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_euler_grid_is_the_one_of_the_pipelines_scheduler(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = euler_sigmas(scheduler, steps)
    assert len(sigmas) == steps + 1 and sigmas[0] == 1 and sigmas[-1] == 0
    scheduler.set_timesteps(steps)
    assert sigmas == scheduler.sigmas.tolist()
    # what its step() does with a velocity is what euler_sample does
    x, theirs = noise(1, 1, 1, 2, 2).float(), noise(1, 1, 1, 2, 2).float()
    for t in scheduler.timesteps:
        theirs = scheduler.step(torch.tanh(theirs) + t / 1000, t, theirs).prev_sample
    ours = flow.euler_sample(lambda x, t: torch.tanh(x) + flow.expand_time(t, x), x, sigmas)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_asking_for_the_grid_leaves_the_scheduler_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    euler_sigmas(scheduler, 4)
    assert torch.equal(scheduler.sigmas, before)
