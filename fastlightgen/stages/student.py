"""What the methods of Stage III have in common: a student that samples in a few steps, and a critic of its clips.

Shapes: x_hat, x_t, noise [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlightgen import flow
from fastlightgen.config import Run
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.experts import Model, TwoExperts
from fastlightgen.models.folder.weights import save_model
from fastlightgen.rng import generator
from fastlightgen.stages.guided import renoised
from fastlightgen.stages.keys import FewStepKeys, MatchingKeys
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.rollouts import FAKE, Rollouts
from fastlightgen.stages.teacher import flow_matching_loss


class FewStepConfig(FewStepKeys, Run):
    """The keys of every method of Stage III and those of every stage; for type annotations."""


class MatchingConfig(MatchingKeys, FewStepConfig):
    """The same for methods with a critic."""


class FewStep:
    """Stage III for the loop, without its losses: the student, its ladder and its result."""

    number = 3
    loss_key, drifts = "loss", True
    cfg: FewStepConfig

    def __init__(
        self,
        cfg: FewStepConfig,
        student: VideoDiT,
        teacher: VideoDiT,
        card: dict[str, Any],
        scale: float | None,
        partner: VideoDiT | None = None,
        trained: nn.Module | None = None,
    ):
        """`scale`: the guidance that the student reads as a number; None: it reads none. `partner`: see Networks.

        `trained`: the module that the student's optimizer trains; None: the student itself.
        """
        self.cfg, self.student, self.teacher, self.card, self.iters = cfg, student, teacher, card, cfg.iters
        self.guidance = scale or 1.0
        self.times = flow.ladder(cfg.steps, cfg.shift)
        # What makes clips: the student, after its partner's rungs.
        self.sampled: Model = TwoExperts(partner, student, cfg.boundary) if partner else student
        trained = student if trained is None else trained
        host = None if trained is student else student
        self.roles = {"student": Role.of(trained, cfg, cfg.own_lr, host=host, ema=cfg.ema, ema_start=cfg.ema_start)}
        self.frozen = [teacher]

    def begin(self) -> None:
        """Nothing to measure before training."""

    def check(self, step: int) -> None:
        """Nothing to check beyond the loop's own checks."""

    def sampler(self) -> dict[str, Any]:
        return {"model": self.sampled, "times": self.times, "guidance": self.guidance, "kind": self.cfg.sampler}

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        card = {"stage": 3, "ladder": self.times, "shift": self.cfg.shift, "sampler": self.cfg.sampler}
        write(self.student, folder, **self.card | card | {"guidance": self.guidance})


class Matching(FewStep):
    """Distribution matching for the loop, without the student's loss: the critic ("fake") follows the student."""

    loss_key = "fake_loss"
    cfg: MatchingConfig

    def __init__(self, cfg: MatchingConfig, nets: Networks, batches: Callable[[int], Batch], card: dict[str, Any]):
        super().__init__(cfg, nets.student, nets.teacher, card, nets.scale, nets.partner, nets.trained)
        self.nets, self.order = nets, cfg.order
        own = flow.rungs_between(self.times, cfg.bounds)
        self.rollouts = Rollouts(cfg, self.order, self.sampled, self.times, batches, own)
        host = nets.teacher if nets.lora else None
        self.roles["fake"] = Role.of(nets.fake_trained, cfg, cfg.critic_lr, title="critic", host=host)
        frozen = (None if nets.lora else nets.teacher), nets.original, nets.partner
        self.frozen = [net for net in frozen if net is not None]

    def updates(self, step: int) -> list[Update]:
        """Return the student's update, if it is due, then the critic's; see `Order`."""
        g = self.order.student(step)
        students = [] if g is None else [Update("student", partial(self.student_loss, g))]
        return students + [Update("fake", partial(self.critic_loss, c)) for c in self.order.critics(step)]

    def student_loss(self, g: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of the student's update g, and the numbers to log."""
        raise NotImplementedError

    def critic_loss(self, c: int) -> tuple[Tensor, dict[str, float]]:
        """Flow matching (Eq. 1) of the critic's update c on the student's own clips, without guidance."""
        gen = generator(self.cfg.seed, FAKE, c)
        x_hat, batch, _ = self.rollouts.for_critic(c, gen)
        t, x_t, noise = renoised(self.cfg, x_hat, gen)
        return flow_matching_loss(self.nets.fake(x_t, t, batch.cond), x_hat, noise), {}


def look(x0: Tensor, batch: Batch, normaliser: Tensor, rung: int) -> dict[str, float]:
    """What the log of a student's update shows: the distance to the real prediction, the contrast of its clips."""
    gap = normaliser.mean().item()  # mean |x0 - x0_real|
    return {
        "x0_gap": gap,
        f"x0_gap_rung{rung + 1}": gap,  # logged per exit rung: each rung has its own scale
        "contrast": x0.flatten(1).std(1).mean().item(),  # std of a clip; grows if a student over-saturates
        "contrast_data": batch.x0.flatten(1).std(1).mean().item(),
    }
