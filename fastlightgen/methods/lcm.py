"""method=lcm: latent consistency distillation (Luo et al., 2310.04378) for flow matching.

The student's x0 estimates at two neighbouring times of one path of the guided teacher should be equal. The path is one
Euler step between points of a fine grid. Shapes: x0, noise, x_t, x_r, v [B, C, F, H, W]; t, r [B].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import ConfigError, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.ema import follow
from fastlightgen.engine.roles import Update
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like, rand
from fastlightgen.stages import rival
from fastlightgen.stages.build import Builder
from fastlightgen.stages.keys import FewStepKeys
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import Method
from fastlightgen.stages.networks import guided_prediction
from fastlightgen.stages.student import FewStep, FewStepConfig

DRAWS = 17  # the purpose of this file's random draws


@dataclass(kw_only=True)
class LcmKeys(rival.RivalKeys, FewStepKeys):
    """Keys of latent consistency distillation."""

    iters: int = field(3000, "optimizer steps", lo=1)
    lr: float = field(8e-6, "learning rate", lo=0)
    points: int = field(
        50, "points of the grid between data and noise; a step of the teacher goes to the next", lo=2, hi=1_000
    )
    distance: str = field(
        "huber", "between two x0 estimates; huber: mean of sqrt(d^2 + c^2) - c; l2: of d^2", choices=("huber", "l2")
    )
    c: float = field(1e-3, "distance=huber: where it turns from quadratic to linear", above=0)
    target: str = field(
        "stopgrad",
        "which network estimates x0 at the cleaner time; stopgrad: the student, without gradient; ema: its average",
        choices=("stopgrad", "ema"),
    )
    target_decay: float = field(0.95, "target=ema: decay of the average", lo=0, below=1)

    def check(self) -> None:
        super().check()
        if self.target == "ema" and self.student_mode == "lora":
            raise ConfigError("target=ema: averages whole networks, not adapters; use stopgrad with student_mode=lora")


class Config(LcmKeys, FewStepConfig):
    """A configuration of this method: its own keys and those of every stage."""


def grid(points: int, shift: float) -> Tensor:
    """The times t_0 = 0 < ... < t_K = 1: K equal steps, shifted as the teacher's sampling."""
    return flow.shift_time(torch.arange(points + 1) / points, shift)


def last_point(cfg: Config) -> int:
    """The number of the last point at which the network predicts: K, or for the low-noise expert less."""
    if cfg.bounds[1] == 1:
        return cfg.points
    if not (below := int((grid(cfg.points, cfg.shift)[1:] < cfg.bounds[1]).sum())):
        raise ValueError(f"points={cfg.points}: none lies below boundary={cfg.boundary:g}; give more points")
    return below


def pseudo_huber(x0: Tensor, target: Tensor, c: float) -> Tensor:
    """The mean over elements of sqrt(d^2 + c^2) - c, d = x0 - target: c keeps single elements from deciding.

    Of the norm over all elements instead, the c of 1e-3 would be no more than a rounding: plain L2.
    """
    wide = torch.promote_types(x0.dtype, torch.float32)
    d = x0.to(wide) - target.to(wide)
    return ((d.square() + c * c).sqrt() - c).mean()


def euler(x_t: Tensor, v: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One step of the teacher's ODE from t to r < t: x_r = x_t + (r - t) v."""
    return x_t + flow.per_sample(r - t, x_t) * v


class Lcm(FewStep):
    """The student, its target and their frozen teacher for the loop."""

    cfg: Config

    def __init__(
        self,
        cfg: Config,
        nets: rival.Pair,
        batches: Callable[[int], Batch],
        card: dict[str, Any],
        target: VideoDiT | None,
    ):
        """`target`: the network that follows the student as an average; None: the student itself."""
        super().__init__(cfg, nets.student, nets.teacher, card, nets.read, trained=nets.trained)
        self.scale, self.batches, self.target = nets.scale, batches, target
        self.roles["student"].carried = target

    def updates(self, step: int) -> list[Update]:
        return [Update("student", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """d(f(x_t, t), SG f'(x_r, r)) with f(x, t) = x - t v(x, t), so that f(x, 0) = x holds for any network."""
        cfg, batch = self.cfg, self.batches(step)
        gen, size = generator(cfg.seed, DRAWS, step), len(batch.x0)
        times, last = grid(cfg.points, cfg.shift), last_point(cfg)
        n = 1 + (rand(size, gen) * last).long().clamp(max=last - 1)  # 1 to K, one for each clip
        t, r = (times[i].to(batch.x0.device) for i in (n, n - 1))
        x_t = flow.add_noise(batch.x0, normal_like(batch.x0, gen), t)
        x_r = euler(x_t, guided_prediction(self.teacher, x_t, t, batch.cond, batch.null, self.scale), t, r)
        with torch.no_grad():
            # At r = 0 the estimate is x_r, whatever the network says there.
            v = (self.target or self.student)(x_r, r.clamp(min=1e-4), batch.cond)
            wanted = flow.x0_from_velocity(x_r, v, r)
        x0 = flow.x0_from_velocity(x_t, self.student(x_t, t, batch.cond), t)
        return (pseudo_huber(x0, wanted, cfg.c) if cfg.distance == "huber" else distance(x0, wanted)), {}

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Move the averaged target."""
        if self.target is not None:
            follow(self.target, self.student, 1 - self.cfg.target_decay)


def build(cfg: Config, with_: Builder) -> Lcm:
    last_point(cfg)
    nets = rival.pair(cfg, with_)
    target = None
    if cfg.target == "ema":
        same = nets.start == nets.folder
        target = with_.copy(nets.teacher, nets.folder) if same else with_.load(nets.start).prune(nets.path)
        target.requires_grad_(False)
    with_.checkpoint(cfg, nets.student)
    stage = Lcm(cfg, nets, with_.batches, nets.card(with_), target)
    stage.roles["student"].file_values = nets.values(with_)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the teacher's guided step, the target's estimate and the student's, with gradient."""
    averaged = cfg.target == "ema"
    nets = {"student": rival.student_net(cfg, net, keep, updates=1, averaged=cfg.ema > 0), "teacher": Net()}
    nets |= {"target": rival.like_student(cfg, net, keep)} if averaged else {}
    estimate = Walk("target" if averaged else "student", [Route()])
    return Iteration(nets, [Walk("teacher", rival.predictions(cfg)), estimate, Walk("student", [Route(grad=True)])])


METHOD = Method(
    stage="3",
    name="lcm",
    title="LCM",
    about="consistency of the student's estimates along the guided teacher's path",
    keys=LcmKeys,
    build=build,
    walks=walks,
    subject=rival.subject,
    inputs=rival.inputs,
    needs=rival.needs,
    unfit={"high": "its estimates are anchored at t = 0, which the high-noise expert never reaches"},
    savings=({"target": "stopgrad"},),
)
