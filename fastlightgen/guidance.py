"""Guidance: plain classifier-free guidance and the well-guided teacher. Pure functions.

Both use the standard form `null + w (cond - null)`. In projects that write `cond + w (cond - null)`, w is smaller by 1.
"""

from torch import Tensor

from fastlightgen.flow import per_sample


def guided(v_cond: Tensor, v_null: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance; scale 1 is the conditional prediction."""
    return v_null + per_sample(scale, v_cond) * (v_cond - v_null)


def well_guided(
    v_weak_cond: Tensor, v_weak_null: Tensor, v_strong_cond: Tensor, beta1: Tensor | float, beta2: Tensor | float
) -> Tensor:
    """Eq. 9: v_real = beta1 (v_p(c) - v_p(null)) + beta2 (v_u(c) - v_p(c)) + v_p(null).

    The pruned path is the weak teacher, the full path the strong one. beta1 = beta2 = 1 gives the strong teacher,
    beta2 = 0 plain guidance on the weak one. The betas are numbers or [B].
    """
    beta1, beta2 = per_sample(beta1, v_weak_cond), per_sample(beta2, v_weak_cond)
    return beta1 * (v_weak_cond - v_weak_null) + beta2 * (v_strong_cond - v_weak_cond) + v_weak_null
