"""Common parts of the methods' losses: distance of predictions, loss of a gradient, times of the scores.

Shapes: x_hat, gradient, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.rng import rand


def distance(v: Tensor | None, other: Tensor) -> Tensor:
    """The mean over elements of |v - other|^2, in float32 at least; 0 for a path that is not taken."""
    if v is None:
        return other.new_zeros(())
    wide = torch.promote_types(v.dtype, torch.float32)
    return (v.to(wide) - other.to(wide)).square().mean()


def dmd_loss(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """Eq. 8: a loss whose gradient with respect to x_hat is `gradient` / numel; descent moves x_hat against it."""
    return 0.5 * (x_hat - (x_hat - gradient).detach()).square().mean()


def uniform(size: int, low: float, high: float, gen: torch.Generator) -> Tensor:
    """Draw U(low, high) for each of `size` clips."""
    return low + (high - low) * rand(size, gen)


def score_times(
    size: int, shift: float, clamp: Sequence[float], gen: torch.Generator, between: Sequence[float] = (0.0, 1.0)
) -> Tensor:
    """Draw the times at which two scores are compared: t ~ U(0, 1), shifted, clamped.

    `between` bounds the shifted times. The uniform draw then covers what the shift maps to this range.
    """
    low, high = (flow.unshift_time(t, shift) for t in between)
    return flow.shift_time(uniform(size, low, high, gen).clamp(1e-4, 1.0), shift).clamp(*clamp)
