"""Rectified-flow algebra with one sign convention, time shift, ladders and the few-step sampler.

x0: clean latent [B, ...]; noise: N(0, I), same shape; t in (0, 1], a number or [B].
x_t = (1 - t) x0 + t noise, and the networks predict v = noise - x0. Eq. 5 of the paper prints the opposite
sign (x0 - x1); Eq. 4, Eq. 8 and the published checkpoints all need the sign used here.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastlightgen.rng import rand, randn


def per_sample(t: Tensor | float, like: Tensor) -> Tensor | float:
    """Reshape [B] values so that they broadcast over `like` [B, ...]; return numbers unchanged."""
    return t.to(like.dtype).view(-1, *[1] * (like.dim() - 1)) if isinstance(t, Tensor) and t.dim() else t


def add_noise(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x0 + t noise."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The regression target v = noise - x0 (Eq. 5 with the sign of Eq. 4)."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Tweedie's estimate of the clean latent, x0 = x_t - t v (Eq. 4)."""
    return x_t - per_sample(t, x_t) * v


def shift_time(t, shift: float):
    """The resolution-dependent time shift s t / (1 + (s - 1) t) of a tensor or number t."""
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t, shift: float):
    """The inverse of shift_time: t / (s - (s - 1) t)."""
    return t / (shift - (shift - 1) * t)


def ladder(num_steps: int, shift: float) -> list[float]:
    """The N sampling times shift_time(1 - i/N), i < N: from 1 down, without the final 0."""
    if num_steps < 1:
        raise ValueError(f"ladder: num_steps is {num_steps}; at least 1 is needed")
    # The first is 1 for every shift; below 1/2 the formula rounds.
    return [1.0, *(shift_time(1 - i / num_steps, shift) for i in range(1, num_steps))]


WHOLE = (0.0, 1.0)  # all times


def unshifted(shift: float, between: Sequence[float], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """The part of the range [low, high] before the shift whose shifted times lie between two bounds."""
    start, stop = (unshift_time(t, shift) for t in between)
    if max(low, start) >= min(high, stop):
        raise ValueError(
            f"no time from {low:g} to {high:g} lies between {between[0]:g} and {between[1]:g} after the shift of "
            f"{shift:g}; give another range, shift= or boundary="
        )
    return max(low, start), min(high, stop)


def draw_times(
    batch: int, shift: float, kind: str, generator: torch.Generator, between: Sequence[float] = WHOLE
) -> Tensor:
    """Draw t [B] from U(0, 1) or logit-normal, then shift it; on the CPU, so that every device sees the same draw.

    `between` bounds the shifted times: the same distribution, given that t lies there.
    """
    low, high = unshifted(shift, between)
    u = rand(batch, generator)
    if kind == "logit_normal" and tuple(between) == WHOLE:
        u = torch.sigmoid(randn(batch, generator))
    elif kind == "logit_normal":  # by the inverse of its distribution function, which is the normal one of logit u
        below = torch.special.ndtr(torch.tensor([low, high], dtype=torch.float64).logit())
        u = torch.special.ndtri(below[0] + (below[1] - below[0]) * u.double()).sigmoid().float()
    elif tuple(between) != WHOLE:
        u = low + (high - low) * u
    return shift_time(u.clamp(1e-4, 1.0), shift).clamp(*between)  # t = 0 has no noise to predict


def rungs_between(times: Sequence[float], between: Sequence[float]) -> range:
    """The rungs of a ladder whose times lie between two bounds, the upper one excluded unless it is 1."""
    low, high = between
    own = [i for i, t in enumerate(times) if low <= t < high or high == t == 1]
    if not own:
        shown = ", ".join(f"{t:.4g}" for t in times)
        raise ValueError(
            f"boundary: no rung of the ladder {shown} lies between {low:g} and {high:g}, where this expert predicts; "
            "give another boundary=, steps= or shift="
        )
    return range(own[0], own[-1] + 1)


Predict = Callable[[Tensor, float], Tensor]  # (x_t, t) -> v


def descend(x: Tensor, v: Tensor, t: float, t_next: float, kind: str, noise: Callable[[], Tensor]) -> Tensor:
    """Go from t down to t_next < t: return the network's next input, from its input x and prediction v at t.

    `ode` takes an Euler step x + (t' - t) v. `stochastic` (the DMD sampler) re-noises the x0 estimate with fresh noise.
    """
    if kind == "ode":
        return x + (t_next - t) * v
    return add_noise(x - t * v, noise(), t_next)  # x - t v is the x0 estimate (Eq. 4)


def arrive(predict: Predict, x: Tensor, times: list[float], kind: str, renoise: Callable[[int], Tensor]) -> Tensor:
    """Walk x from noise at times[0] down the ladder, without gradients; return the network's input at the last time.

    Step i goes as in `descend`, with the noise `renoise(i)`.
    """
    for i, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        with torch.no_grad():
            x = descend(x, predict(x, t), t, t_next, kind, partial(renoise, i))
    return x


def rollout(predict: Predict, x: Tensor, times: list[float], kind: str, renoise: Callable[[int], Tensor]) -> Tensor:
    """`arrive` at the last time and return the x0 estimate x - t v there; this last evaluation keeps gradients.

    Sampling and Stage III's backward simulation are therefore the same function: an early exit is a shorter `times`.
    """
    x = arrive(predict, x, times, kind, renoise)
    return x - times[-1] * predict(x, times[-1])
