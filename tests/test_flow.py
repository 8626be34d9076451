"""Rectified-flow algebra on numbers with a closed form: Gaussians, hand-written loops, diffusers' stock scheduler.

For data N(m, s^2) in one dimension the optimal velocity is known, with D = (1 - t)^2 s^2 + t^2 the variance of x_t:
E[x0 | x_t] = m + (1 - t) s^2 / D (x_t - (1 - t) m) and v* = (x_t - E[x0 | x_t]) / t.
"""

import math

import pytest
import torch
from torch import Tensor

from fastlightgen import flow

TIMES = flow.ladder(4, 5.0)


def posterior(t: float, m: float, s: float) -> tuple[float, float]:
    """(a, b) with E[x0 | x_t] = a x_t + b."""
    a = (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t**2)
    return a, m - a * (1 - t) * m


def best_v(x: Tensor, t: float, m: float, s: float) -> Tensor:
    a, b = posterior(t, m, s)
    return (x - (a * x + b)) / t


def never(i: int) -> Tensor:
    raise AssertionError(f"no noise was expected at rung {i}")


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 2, 3, 4, 5, dtype=torch.float64, generator=gen)
    return x0, noise, torch.tensor([0.2, 0.75, 1.0], dtype=torch.float64)


def test_identities(pair):
    x0, noise, t = pair
    x_t, v, at = flow.add_noise(x0, noise, t), flow.velocity(x0, noise), t.view(3, 1, 1, 1, 1)
    torch.testing.assert_close(x_t, torch.stack([(1 - u) * a + u * n for a, n, u in zip(x0, noise, t)]))
    torch.testing.assert_close(flow.x0_from_velocity(x_t, v, t), x0)  # x0 = x_t - t v
    torch.testing.assert_close(x_t + (1 - at) * v, noise)  # x1 = x_t + (1 - t) v
    other = torch.randn_like(v)  # x0_f - x0_r == t (v_r - v_f)
    difference = flow.x0_from_velocity(x_t, v, t) - flow.x0_from_velocity(x_t, other, t)
    torch.testing.assert_close(difference, at * (other - v))
    # The derivative of x_t in t is v: the sign convention itself.
    torch.testing.assert_close((flow.add_noise(x0, noise, t + 1e-6) - x_t) / 1e-6, v, rtol=1e-6, atol=1e-8)


def test_one_number_and_one_number_per_sample_agree(pair):
    x0, noise, _ = pair
    same = torch.full((3,), 0.25, dtype=torch.float64)
    assert torch.equal(flow.add_noise(x0, noise, 0.25), flow.add_noise(x0, noise, same))
    assert torch.equal(flow.x0_from_velocity(x0, noise, torch.tensor(0.25)), flow.x0_from_velocity(x0, noise, 0.25))


def test_one_euler_step_with_the_true_velocity_returns_the_data(pair):
    x0, noise, _ = pair
    got = flow.rollout(lambda x, t: flow.velocity(x0, noise), noise, [1.0], "ode", never)
    torch.testing.assert_close(got, x0)
    torch.testing.assert_close(noise + (0 - 1) * flow.velocity(x0, noise), x0)


def test_ladder_and_shift():
    assert TIMES == pytest.approx([1, 0.9375, 0.8333333333, 0.625], abs=1e-9)
    assert flow.ladder(1, 5.0) == [1.0] and flow.ladder(4, 1.0) == [1, 0.75, 0.5, 0.25]
    # The shift multiplies the odds t / (1 - t) by s.
    for t, s in [(0.1, 5.0), (0.5, 3.0), (0.9, 17.0)]:
        u = flow.shift_time(t, s)
        assert u / (1 - u) == pytest.approx(s * t / (1 - t))
        assert flow.unshift_time(u, s) == pytest.approx(t)
    assert [flow.unshift_time(t, 5.0) for t in (0.0, 1.0)] == [0.0, 1.0]
    with pytest.raises(ValueError, match="num_steps is 0"):
        flow.ladder(0, 5.0)


@pytest.mark.parametrize("shift", [3.0, 5.0])
@pytest.mark.parametrize("steps", range(1, 9))
def test_ladder_is_what_the_exported_stock_scheduler_steps_through(steps: int, shift: float):
    diffusers = pytest.importorskip("diffusers")
    end = shift / (steps + shift - 1) if steps > 1 else None  # one step has no spacing
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=shift * steps / (steps + shift - 1), shift_terminal=end, stochastic_sampling=True
    )
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    # The stock class starts its own grid at sigma_min = 1/1000 before the shift, not at 0: up to 1.1e-3 here.
    assert sigmas[:-1] == pytest.approx(flow.ladder(steps, shift), abs=2e-3) and sigmas[-1] == 0

    def noise(i: int) -> Tensor:
        torch.manual_seed(i)
        return torch.randn(2, 5)

    x = start = noise(99)
    for i, t in enumerate(scheduler.timesteps):
        torch.manual_seed(i)
        x = scheduler.step(best_v(x, sigmas[i], 2.0, 0.5), t, x).prev_sample
    ours = flow.rollout(lambda x, t: best_v(x, t, 2.0, 0.5), start, sigmas[:-1], "stochastic", noise)
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_ode_rollout_is_euler_by_hand():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    got = flow.rollout(lambda x, t: best_v(x, t, 2.0, 0.5), x, TIMES, "ode", never)
    for t, after in zip(TIMES, [*TIMES[1:], 0.0]):
        x = x + (after - t) * best_v(x, t, 2.0, 0.5)
    torch.testing.assert_close(got, x)


def test_fine_ode_rollout_carries_noise_to_the_data():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    got = flow.rollout(lambda x, t: best_v(x, t, 2.0, 0.5), x, flow.ladder(2000, 1.0), "ode", never)
    # The exact flow between two Gaussians is x -> m + s x; Euler's error is of the order of the step, 1/2000.
    torch.testing.assert_close(got, 2 + 0.5 * x, rtol=0, atol=2e-3)


def test_stochastic_rollout_of_a_gaussian_has_the_predicted_moments():
    count, m, s = 200_000, 2.0, 0.5
    gen = torch.Generator().manual_seed(1)

    def fresh(_: int = 0) -> Tensor:
        return torch.randn(count, generator=gen, dtype=torch.float64)

    got = flow.rollout(lambda x, t: best_v(x, t, m, s), fresh(), TIMES, "stochastic", fresh)
    # Every step is linear: x0 = a x + b, then x' = (1 - t') x0 + t' noise with independent noise.
    mean, var = 0.0, 1.0
    for t, after in zip(TIMES, [*TIMES[1:], 0.0]):
        a, b = posterior(t, m, s)
        mean, var = (1 - after) * (a * mean + b), ((1 - after) * a) ** 2 * var + after**2
    assert mean == pytest.approx(m)
    # Five standard errors of a sample mean and of a sample variance.
    assert got.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / count))
    assert got.var().item() == pytest.approx(var, abs=5 * var * math.sqrt(2 / count))


@pytest.mark.parametrize("kind", ["ode", "stochastic"])
def test_an_early_exit_is_a_prefix(kind: str):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    visited = []

    def predict(x: Tensor, t: float) -> Tensor:
        v = best_v(x, t, 2.0, 0.5)
        visited.append(x - t * v)
        return v

    def renoise(i: int) -> Tensor:
        return torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(i))

    flow.rollout(predict, x, TIMES, kind, renoise)
    estimates = list(visited)
    for exit in range(4):
        assert torch.equal(flow.rollout(predict, x, TIMES[: exit + 1], kind, renoise), estimates[exit])


@pytest.mark.parametrize("kind", ["ode", "stochastic"])
def test_only_the_last_rung_carries_gradient(kind: str):
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    seen = []

    def predict(x: Tensor, t: float) -> Tensor:
        seen.append(x)
        return w * x

    x = torch.ones(3, dtype=torch.float64)
    flow.rollout(predict, x, TIMES, kind, lambda i: x).sum().backward()
    assert not seen[-1].requires_grad
    torch.testing.assert_close(w.grad, -TIMES[-1] * seen[-1].sum())  # d/dw (x - t w x) with x held fixed


def test_drawn_times_have_the_stated_quantiles():
    count = 100_000
    uniform = flow.draw_times(count, 3.0, "uniform", torch.Generator().manual_seed(0))
    normal = flow.draw_times(count, 3.0, "logit_normal", torch.Generator().manual_seed(0))
    for q, z in [(0.1, -1.2815516), (0.5, 0.0), (0.9, 1.2815516)]:
        # A quantile of a sample of U(0, 1) is within 5 sqrt(q (1 - q) / n) < 0.008; the shift stretches by up to 3.
        assert uniform.quantile(q).item() == pytest.approx(flow.shift_time(q, 3.0), abs=0.024)
        assert normal.quantile(q).item() == pytest.approx(flow.shift_time(1 / (1 + math.exp(-z)), 3.0), abs=0.024)
    assert 0 < uniform.min() and uniform.max() <= 1
