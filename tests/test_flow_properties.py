"""The flow's algebra, ladders and rotary tables for random sizes, against float64 formulas."""

import cmath

import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import Tensor

from fastlightgen import flow
from fastlightgen.ops import rope_factors
from fastlightgen.ops.qk_norm_rope.reference import norm_rope

EPS = torch.finfo(torch.float64).eps
SHIFTS = st.floats(0.01, 1_000)
TIMES = st.floats(1e-4, 1.0)


def latents(seed: int, batch: int, scale: float) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, batch, 2, 3, dtype=torch.float64, generator=gen)
    return scale * x0, noise


@tried(60)
@given(st.integers(0, 10**6), st.lists(TIMES, min_size=1, max_size=4), st.floats(1e-3, 1e3))
def test_data_noise_velocity_and_score_give_each_other(seed, times, scale):
    x0, noise = latents(seed, len(times), scale)
    t = torch.tensor(times, dtype=torch.float64)
    at = t.view(-1, 1, 1)
    x_t, v = flow.add_noise(x0, noise, t), flow.velocity(x0, noise)
    close = {"rtol": 0, "atol": 8 * EPS * (x0.abs() + noise.abs()).max().item()}  # a handful of roundings
    torch.testing.assert_close(flow.x0_from_velocity(x_t, v, t), x0, **close)
    torch.testing.assert_close(x_t + (1 - at) * v, noise, **close)
    # The score of x_t given x0 is that of N((1 - t) x0, t^2), -(x_t - (1 - t) x0) / t^2; it is -noise / t.
    score = -(x_t - (1 - at) * flow.x0_from_velocity(x_t, v, t)) / at**2
    torch.testing.assert_close(score * at**2, -noise * at, **close)
    # A step of Euler from t to s, with the true velocity, is the noised clip at s.
    s = t / 2
    stepped = flow.descend(x_t, v, 1.0, 0.5, "ode", lambda: noise)
    torch.testing.assert_close(stepped, x_t - v / 2, **close)
    torch.testing.assert_close(x_t + (s - t).view(-1, 1, 1) * v, flow.add_noise(x0, noise, s), **close)


@tried(100)
@given(st.integers(1, 200), SHIFTS)
def test_a_ladder_falls_from_1_along_the_shifted_odds(steps, shift):
    times = flow.ladder(steps, shift)
    assert len(times) == steps and times[0] == 1.0 and all(0 < t <= 1 for t in times)
    assert all(after < before for before, after in zip(times, times[1:]))
    for i, t in enumerate(times[1:], 1):
        # odds t / (1 - t) are the shift times those of 1 - i / N, which are (N - i) / i; and t / (1 - t) loses
        # 1 / (1 - t) of its precision near 1
        assert abs(t * i - (1 - t) * shift * (steps - i)) <= 8 * EPS * max(steps, shift * steps)


@tried(100)
@given(SHIFTS, TIMES)
def test_unshifting_undoes_the_shift(shift, t):
    u = flow.shift_time(t, shift)
    # du / dt = s / (1 + (s - 1) t)^2: where the shift is flat, a rounding of u moves t by its inverse
    slope = shift / (1 + (shift - 1) * t) ** 2
    assert abs(flow.unshift_time(u, shift) - t) <= 8 * EPS * max(1.0, 1 / slope, 1 / shift)
    assert flow.shift_time(flow.shift_time(t, shift), 1 / shift) - t <= 8 * EPS * max(1.0, 1 / slope)


@tried(25)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(*[st.integers(1, 4).map(lambda n: 2 * n)] * 3),
    st.floats(2.0, 1e6),
    st.integers(1, 3),
)
def test_rotary_tables_by_complex_numbers(grid, dims, theta, heads):
    """Token (f, h, w), pair i of an axis of d channels: multiplied by exp(i position theta^(-2 i / d))."""
    rope = rope_factors(grid, dims, theta, dtype=torch.float64)
    gen, width = torch.Generator().manual_seed(0), heads * sum(dims)
    count = grid[0] * grid[1] * grid[2]
    x = torch.randn(1, count + 2, width, generator=gen, dtype=torch.float64)  # two tokens of text, not turned
    got = norm_rope(x, torch.ones(sum(dims), dtype=torch.float64), rope.turn, 0.0)
    wanted = x.unflatten(-1, (heads, -1))
    wanted = wanted / wanted.square().mean(-1, keepdim=True).sqrt()
    pairs = torch.view_as_complex(wanted.unflatten(-1, (-1, 2)).contiguous()).clone()
    for token in range(count):
        place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        turns = [cmath.exp(1j * p * theta ** (-2 * i / d)) for p, d in zip(place, dims) for i in range(d // 2)]
        pairs[0, token] *= torch.tensor(turns, dtype=torch.complex128)
    torch.testing.assert_close(got, torch.view_as_real(pairs).flatten(-3), rtol=0, atol=1e-12)
