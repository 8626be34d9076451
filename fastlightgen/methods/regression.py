"""method=regression: the student follows the guided teacher on noised clips, and is sampled in few steps.

Guidance distillation (Meng et al. 2022, arXiv 2210.03142, their first stage) for one fixed scale, into a student that
may be pruned. It needs neither rollouts nor a critic. Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import TIMES, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Update
from fastlightgen.models.cost import Network
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import rival
from fastlightgen.stages.build import Builder
from fastlightgen.stages.keys import FewStepKeys
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import Method
from fastlightgen.stages.networks import guided_prediction
from fastlightgen.stages.student import FewStep, FewStepConfig

DRAWS = 15  # the purpose of this file's random draws


@dataclass(kw_only=True)
class RegressionKeys(rival.RivalKeys, FewStepKeys):
    """Keys of the guided regression."""

    iters: int = field(3000, "optimizer steps", lo=1)
    lr: float = field(1e-5, "learning rate", lo=0)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)


class Config(RegressionKeys, FewStepConfig):
    """A configuration of this method: its own keys and those of every stage."""


def regression_loss(v: Tensor, v_teacher: Tensor) -> Tensor:
    """The mean over elements of |v - SG(v_teacher)|^2: Eq. 6 for the pruned path alone, with a guided target."""
    return distance(v, v_teacher.detach())


class Regression(FewStep):
    """The student and its frozen teacher for the loop."""

    cfg: Config

    def __init__(self, cfg: Config, nets: rival.Pair, batches: Callable[[int], Batch], card: dict[str, Any]):
        super().__init__(cfg, nets.student, nets.teacher, card, nets.read, trained=nets.trained)
        self.scale, self.batches = nets.scale, batches

    def updates(self, step: int) -> list[Update]:
        return [Update("student", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The student and the guided teacher see the same noised clips."""
        cfg, batch = self.cfg, self.batches(step)
        gen = generator(cfg.seed, DRAWS, step)
        t = flow.draw_times(len(batch.x0), cfg.shift, cfg.time, gen, cfg.bounds).to(batch.x0.device)
        x_t = flow.add_noise(batch.x0, normal_like(batch.x0, gen), t)
        v_teacher = guided_prediction(self.teacher, x_t, t, batch.cond, batch.null, self.scale)
        return regression_loss(self.student(x_t, t, batch.cond), v_teacher), {}


def build(cfg: Config, with_: Builder) -> Regression:
    nets = rival.pair(cfg, with_)
    with_.checkpoint(cfg, nets.student)
    stage = Regression(cfg, nets, with_.batches, nets.card(with_))
    stage.roles["student"].file_values = nets.values(with_)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the teacher's guided prediction and the student's, with gradient."""
    nets = {"student": rival.student_net(cfg, net, keep, updates=1, averaged=cfg.ema > 0), "teacher": Net()}
    return Iteration(nets, [Walk("teacher", rival.predictions(cfg)), Walk("student", [Route(grad=True)])])


METHOD = Method(
    stage="3",
    name="regression",
    title="Guided regression",
    about="the student follows the guided teacher on noised clips (Meng et al.)",
    keys=RegressionKeys,
    build=build,
    walks=walks,
    subject=rival.subject,
    inputs=rival.inputs,
    needs=rival.needs,
)
