"""Common parts of distribution matching methods: backward simulation, times of the scores, loss of a gradient.

Shapes: x0, x_hat, x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.models.base import VideoDiT
from fastlightgen.rng import normal_like, rand


def dmd_loss(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 8: a loss whose gradient with respect to x_hat is `gradient` / numel; descent moves x_hat against it."""
    return 0.5 * (x_hat - (x_hat - gradient).detach()).square().mean()


def uniform(size: int, low: float, high: float, gen: torch.Generator) -> Tensor:
    """Draw U(low, high) for each of `size` clips."""
    return low + (high - low) * rand(size, gen)


def score_times(size: int, shift: float, clamp: Sequence[float], gen: torch.Generator) -> Tensor:
    """Draw the times at which the two scores are compared: t ~ U(0, 1), shifted, clamped."""
    return flow.draw_times(size, shift, "uniform", gen).clamp(*clamp)


def simulate(
    student: VideoDiT, batch: Batch, times: Sequence[float], start: str, sampler: str, gen: torch.Generator
) -> tuple[Tensor, int]:
    """Backward simulation with early exit: return the student's x0 at a random rung of `times`, and the rung.

    With start=simulate the student itself walks from noise down to that rung; with start=data it starts there from
    noised clips of the data. `times` is the ladder; rungs count from 0. Only the last step carries gradient.
    """
    exit_rung = int(torch.randint(len(times), (), generator=gen))  # one for the whole batch, the same on every rank
    noise = normal_like(batch.x0, gen)
    walked, x = list(times[: exit_rung + 1]), noise
    if start == "data":
        walked, x = walked[-1:], flow.add_noise(batch.x0, noise, times[exit_rung])
    x_hat = flow.rollout(lambda x, t: student(x, t, batch.cond), x, walked, sampler, lambda _: normal_like(x, gen))
    return x_hat, exit_rung
