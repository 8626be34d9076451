"""The specification of dmd_gradient."""

import torch
from torch import Tensor

from fastlightgen.flow import x0_from_velocity
from fastlightgen.guidance import well_guided


def dmd_gradient(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    v_fake: Tensor,
    v_weak_cond: Tensor,
    v_weak_null: Tensor,
    v_strong_cond: Tensor,
    beta1: Tensor | float,
    beta2: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Eq. 8 with sigma_t = t: return grad = (x0_fake - x0_real) / normaliser, shaped like x0, and normaliser [B].

    x0_* = x_t - t v_*, and normaliser[b] = mean |x0 - x0_real| + 1e-6 (DMD2). float32 inside (float64 stays float64).
    """
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    x_t = x_t.to(wide)
    v_real = well_guided(v_weak_cond.to(wide), v_weak_null.to(wide), v_strong_cond.to(wide), beta1, beta2)
    x0_real = x0_from_velocity(x_t, v_real, t)
    x0_fake = x0_from_velocity(x_t, v_fake.to(wide), t)
    normaliser = (x0.to(wide) - x0_real).abs().flatten(1).mean(1) + 1e-6
    grad = (x0_fake - x0_real) / normaliser.view(-1, *[1] * (x0.dim() - 1))
    return grad.to(x0.dtype), normaliser
