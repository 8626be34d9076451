"""The student's gradient under the well-guided teacher (Eq. 8 and 9), and the times at which scores are compared.

Shapes: x0, x_t, noise, v [B, C, F, H, W]; t, beta [B].
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.ops import dmd_gradient
from fastlightgen.rng import normal_like
from fastlightgen.stages.matching import score_times, uniform
from fastlightgen.stages.networks import Networks


class Scores(Protocol):
    """The keys of a comparison of two scores; the methods document them."""

    shift: float
    score_shift: float
    t_clamp: list[float]
    normaliser: str

    @property
    def bounds(self) -> tuple[float, float]: ...


class Keys(Scores, Protocol):
    """The keys of the well-guided teacher."""

    beta1: float
    beta2: float
    a1: float
    b1: float
    a2: float
    b2: float
    guidance_times: str

    @property
    def two_times(self) -> bool: ...


def student_gradient(
    cfg: Keys, nets: Networks, x0: Tensor, batch: Batch, exit_time: float, gen: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Eq. 8 under Eq. 9: return the gradient for the student's clips x0, and its normaliser mean |x0 - x0_real| [B].

    With two times, Eq. 9 is taken in two parts, each at a time and noise of its own (Decoupled DMD, arXiv 2511.22677):

        v_real - v_fake = [v_pc + beta2 (v_uc - v_pc) - v_fake]  +  (beta1 - 1) (v_pc - v_pn)
                          matching part                             guidance part

    The matching part is Eq. 8 under Eq. 9 with beta1 = 1, where v_pn cancels. The guidance part is Eq. 8 under Eq. 9
    with beta2 = 0 and with v_pc in the place of v_fake. Each part has the normaliser of its own time, because
    mean |x0 - x0_real| grows with the time. With equal times and noise, and normaliser=none, the parts add up to the
    undivided gradient. The normaliser that is returned is then that of the matching part.
    """
    t, x_t, _ = renoised(cfg, x0, gen)
    beta1, beta2 = betas(cfg, x0, gen)
    v_fake = nets.fake(x_t, t, batch.cond)
    if not cfg.two_times:
        v_pc, v_pn, v_uc = nets.real(x_t, t, batch)
        return eq8(cfg, x0, x_t, t, v_fake, v_pc, v_pn, v_uc, beta1, beta2)

    v_pc, v_uc = nets.matching(x_t, t, batch)
    matching, normaliser = eq8(cfg, x0, x_t, t, v_fake, v_pc, v_pc, v_uc, 1.0, beta2)
    t, x_t, _ = renoised(cfg, x0, gen, (0.0, exit_time) if cfg.guidance_times == "below" else (exit_time, 1.0))
    v_pc, v_pn = nets.guidance(x_t, t, batch)
    guidance, _ = eq8(cfg, x0, x_t, t, v_pc, v_pc, v_pn, v_pc, beta1, 0.0)
    return matching + guidance, normaliser


def eq8(
    cfg: Scores,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    v_fake: Tensor,
    v_pc: Tensor,
    v_pn: Tensor,
    v_uc: Tensor,
    beta1: Tensor | float,
    beta2: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Eq. 9 mixes v_pc, v_pn and v_uc into v_real; Eq. 8 is the difference of the two scores, as x0 estimates."""
    gradient, normaliser = dmd_gradient(x0, x_t, t, v_fake, v_pc, v_pn, v_uc, beta1, beta2)
    return gradient * flow.per_sample(normaliser, gradient) if cfg.normaliser == "none" else gradient, normaliser


def renoised(
    cfg: Scores, x0: Tensor, gen: torch.Generator, between: Sequence[float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (t, x_t, noise): clips of the student, noised to a time between two bounds, and of this expert."""
    inside = [min(max(t, cfg.bounds[0]), cfg.bounds[1]) for t in between]
    t = score_times(len(x0), cfg.score_shift or cfg.shift, cfg.t_clamp, gen, inside).to(x0.device)
    noise = normal_like(x0, gen)
    return t, flow.add_noise(x0, noise, t), noise


def betas(cfg: Keys, x0: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eq. 9: beta1 ~ U[beta1 - a1, beta1 + b1], beta2 ~ U[beta2 - a2, beta2 + b2], one of each per clip."""
    beta1 = uniform(len(x0), cfg.beta1 - cfg.a1, cfg.beta1 + cfg.b1, gen).to(x0.device)
    beta2 = uniform(len(x0), cfg.beta2 - cfg.a2, cfg.beta2 + cfg.b2, gen).to(x0.device)
    return beta1, beta2
