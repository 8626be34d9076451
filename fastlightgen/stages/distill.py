"""Stage III: distribution matching under a well-guided teacher (Eq. 8 and 9); trains a pruned few-step student.

Shapes: x0, x_hat, x_t, noise [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, ConfigError, Run, StudentKeys, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.networks import trained_folder
from fastlightgen.models.folder.weights import read_card, save_model
from fastlightgen.models.lora import attach_lora
from fastlightgen.parallel.log import say
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator
from fastlightgen.stages.build import Builder
from fastlightgen.stages.guided import renoised, student_gradient
from fastlightgen.stages.matching import dmd_loss
from fastlightgen.stages.method import Method
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.rollouts import FAKE, STUDENT, Order, Rollouts
from fastlightgen.stages.start import inputs, needs, pruned_path, stage2_folder, student_folder, subject
from fastlightgen.stages.teacher import flow_matching_loss

ADAPTERS = 7  # the purpose of this file's own random draws; those of the updates stand in rollouts.py


@dataclass(kw_only=True)
class DistillKeys(StudentKeys):
    """Keys of Stage III."""

    iters: int = field(3000, "iterations; see count", lo=1, everyday=True)
    lr: float = field(2e-6, "learning rate of the student", lo=0, everyday=True)
    lr_fake: float = field(
        0.0,
        "learning rate of the critic; 0: 4e-7 for fake_mode=copy, 5e-5 for lora",
        lo=0,
        everyday=True,
    )
    betas: list[float] = field([0.0, 0.999], "AdamW's two decay rates", lo=0, below=1)
    clip: float = field(10.0, "largest gradient norm", above=0)
    warmup: int = field(0, "steps over which the learning rates rise from 0", lo=0)
    beta1: float = field(3.5, "Eq. 9: weight of the prompt, v_pc - v_pn; the centre of its interval", everyday=True)
    beta2: float = field(
        0.25, "Eq. 9: weight of the strong teacher, v_uc - v_pc; the centre of its interval", everyday=True
    )
    a1: float = field(1.0, "beta1 is drawn from [beta1 - a1, beta1 + b1]", lo=0)
    b1: float = field(1.0, "see a1", lo=0)
    a2: float = field(0.1, "beta2 is drawn from [beta2 - a2, beta2 + b2]", lo=0)
    b2: float = field(0.1, "see a2", lo=0)
    steps: int = field(4, "sampling steps of the student", lo=1, hi=8, everyday=True)
    rollout: str = field(
        "simulate",
        "the student's inputs; simulate: its own steps from noise; data: noised clips",
        choices=("simulate", "data"),
    )
    rungs: str = field(
        "cycled",
        "the rung at which an update leaves the ladder; cycled: each rung once per `steps` updates; random: any",
        choices=("cycled", "random"),
    )
    rollouts: str = field(
        "fresh",
        "fresh: each update has its own prompts and rollout; shared: `ratio` critic updates and the next student "
        "update share prompts and one rollout of all rungs",
        choices=("fresh", "shared"),
    )
    ratio: int = field(5, "critic updates per student update", lo=1, everyday=True)
    count: str = field(
        "outer", "what iters counts; outer: critic updates; generator: student updates", choices=("outer", "generator")
    )
    critic_start: int = field(
        100, "critic updates before the first student update, a multiple of ratio; iters counts them too", lo=0
    )
    t_clamp: list[float] = field([0.02, 0.98], "range of the score's time after the shift", lo=0, hi=1)
    fake_arch: str = field("pruned", "blocks of the critic", choices=("pruned", "full"))
    fake_mode: str = field(
        "copy",
        "the critic's weights; copy: its own; lora: low-rank adapters on those of Stage II",
        choices=("copy", "lora"),
        everyday=True,
    )
    lora_rank: int = field(16, "fake_mode=lora: rank of the critic's adapters", lo=1)
    guidance_times: str = field(
        "same",
        "when Eq. 9's guidance part (beta1 - 1) (v_pc - v_pn) is taken; same: at the time of the other part; below: at "
        "cleaner times than the rung that the student left (Decoupled DMD); above: at noisier ones",
        choices=("same", "below", "above"),
    )
    strong: str = field(
        "stage2", "the strong teacher in Eq. 9; original: before Stage II", choices=("stage2", "original")
    )
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    sampler: str = field("stochastic", "how the student goes from step to step", choices=("stochastic", "ode"))
    ema: float = field(
        0.99, "decay of the student's averaged weights; 0 keeps no average", lo=0, below=1, everyday=True
    )
    ema_start: int = field(0, "student updates before averaging starts", lo=0)
    normaliser: str = field(
        "dmd", "dmd: divide the gradient by mean |x0 - x0_real|; none: do not", choices=("dmd", "none")
    )
    score_shift: float = field(0.0, "time shift of the score's time; 0: same as shift", lo=0)
    stage2_model: str = field("", "model folder that Stage II left; empty: RUN/stage2/model")
    start_model: str = field(
        "", "model folder whose pruned path the student starts from; empty: the Stage II network itself"
    )

    def check(self) -> None:
        super().check()
        self.check_ordered("t_clamp")
        if self.guidance_times != "same" and self.teacher_guidance == "embedded":
            raise ConfigError(
                f"guidance_times={self.guidance_times}: teacher_guidance=embedded has no guidance part; use same"
            )
        critics = self.iters * self.order.critics_per_step
        if self.critic_start % self.ratio:  # then updates of the student would fall between the lines of the log
            raise ConfigError(f"critic_start={self.critic_start}: wanted a multiple of ratio={self.ratio}")
        if self.critic_start >= critics:
            raise ConfigError(
                f"critic_start={self.critic_start}: iters={self.iters} leaves no update of the student; "
                f"wanted below {critics}"
            )

    @property
    def critic_lr(self) -> float:
        """Return the critic's learning rate: that of Self-Forcing-Plus, or for adapters that of DMD2's recipe."""
        return self.lr_fake or (5e-5 if self.fake_mode == "lora" else 4e-7)

    @property
    def order(self) -> Order:
        """Return the order of the updates.

        count=outer (DMD2): the critic is updated at every iteration, the generator at every ratio-th.
        count=generator: the generator is updated at every iteration, followed by `ratio` critic updates.
        """
        return Order(self.ratio, 1 if self.count == "outer" else self.ratio, self.critic_start)

    @property
    def updates(self) -> tuple[float, float]:
        """Return the mean numbers of generator and critic updates per iteration."""
        critics = self.order.critics_per_step
        start = self.critic_start / (self.iters * critics)  # share of the iterations without the generator
        return (1 - start) * critics / self.ratio, critics


class Config(DistillKeys, Run):
    """A configuration of this stage: its own keys and those of every stage."""


class Distill:
    """Stage III for the loop: the student, the critic ("fake") and their frozen teachers."""

    number = 3
    loss_key, drifts = "fake_loss", True

    def __init__(self, cfg: Config, nets: Networks, batches: Callable[[int], Batch], card: dict[str, Any]):
        self.cfg, self.nets, self.card, self.iters = cfg, nets, card, cfg.iters
        self.teacher = nets.teacher
        self.times = flow.ladder(cfg.steps, cfg.shift)
        self.order = cfg.order
        self.rollouts = Rollouts(cfg, self.order, nets.student, self.times, batches)
        self.roles = {
            "student": Role.of(nets.student, cfg, ema=cfg.ema, ema_start=cfg.ema_start),
            "fake": Role.of(
                nets.fake_trained, cfg, cfg.critic_lr, title="critic", host=nets.teacher if nets.lora else None
            ),
        }
        self.frozen = [net for net in ((None if nets.lora else nets.teacher), nets.original) if net is not None]

    def begin(self) -> None:
        """Nothing to measure before training."""

    def updates(self, step: int) -> list[Update]:
        """Return the student's update, if it is due, then the critic's; see `Order`."""
        g = self.order.student(step)
        students = [] if g is None else [Update("student", partial(self.student_loss, g))]
        return students + [Update("fake", partial(self.critic_loss, c)) for c in self.order.critics(step)]

    def student_loss(self, g: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 8 and 9, for the student's update g. No gradient flows through x_t into the two scores."""
        cfg = self.cfg
        gen = generator(cfg.seed, STUDENT, self.order.next_critic(g))
        x_hat, batch, rung = self.rollouts.for_student(g, gen)
        x0 = x_hat.detach()
        with torch.no_grad():
            gradient, normaliser = student_gradient(cfg, self.nets, x0, batch, self.times[rung], gen)
        gap = normaliser.mean().item()  # mean |x - x0_real|
        return dmd_loss(x_hat, gradient), {
            "x0_gap": gap,
            f"x0_gap_rung{rung + 1}": gap,  # logged per exit rung: each rung has its own scale
            "contrast": x0.flatten(1).std(1).mean().item(),  # std of a clip; grows if a student over-saturates
            "contrast_data": batch.x0.flatten(1).std(1).mean().item(),
        }

    def critic_loss(self, c: int) -> tuple[Tensor, dict[str, float]]:
        """Flow matching (Eq. 1) of the critic's update c on the student's own clips, without guidance."""
        cfg = self.cfg
        gen = generator(cfg.seed, FAKE, c)
        x_hat, batch, _ = self.rollouts.for_critic(c, gen)
        t, x_t, noise = renoised(cfg, x_hat, gen)
        return flow_matching_loss(self.nets.fake(x_t, t, batch.cond), x_hat, noise), {}

    def check(self, step: int) -> None:
        """Nothing to check beyond the loop's own checks."""

    def sampler(self) -> dict[str, Any]:
        plan = {"times": self.times, "guidance": self.nets.scale or 1.0, "kind": self.cfg.sampler}
        return {"model": self.nets.student} | plan

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        cfg = self.cfg
        card = {"stage": 3, "ladder": self.times, "shift": cfg.shift, "sampler": cfg.sampler}
        write(self.nets.student, folder, **self.card | card | {"guidance": self.nets.scale or 1.0})


def build(cfg: Config, with_: Builder) -> Distill:
    """Build teacher, student and critic from Stage II's folder, and with strong=original the original teacher."""
    folder = stage2_folder(cfg)
    keep = pruned_path(folder)
    start, card = student_folder(cfg.start_model, folder, keep), read_card(folder)
    teacher = with_.load(folder).requires_grad_(False)
    with_.check_data(teacher, card)
    with_.read_guidance(cfg.teacher_guidance, teacher, card)
    student = with_.load(start) if cfg.start_model else with_.copy(teacher, folder)
    student = student.requires_grad_(True).prune(keep)
    original = None
    if cfg.strong == "original":
        original = with_.load(trained_folder(cfg.model)).requires_grad_(False)
    fake_keep = keep if cfg.fake_arch == "pruned" else None
    fake, trained = teacher, None
    if cfg.fake_mode == "lora":  # the critic is the teacher with adapters, which are off in the teacher's predictions
        trained = attach_lora(teacher, cfg.lora_rank, generator(cfg.seed, ADAPTERS))
    else:
        fake = with_.copy(teacher, folder).requires_grad_(True)
        fake, fake_keep = (fake.prune(keep), None) if fake_keep is not None else (fake, None)
    with_.checkpoint(cfg, student, fake)
    say(f"learning rates: student {cfg.lr:g}, critic {cfg.critic_lr:g}")
    nets = Networks(student, teacher, keep, fake, fake_keep, trained or fake, trained is not None, original)
    nets.scale = with_.guidance
    stage = Distill(cfg, nets, with_.batches, with_.card(source=card.get("source"), kept_blocks=keep))
    stage.roles["student"].file_values = with_.file_values(start, keep)
    if trained is None:  # adapters start from values of their own
        stage.roles["fake"].file_values = with_.file_values(folder, keep if cfg.fake_arch == "pruned" else None)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the rollouts, the student's update (Eq. 9) and the critic's."""
    generators, critics = cfg.updates
    lora, fake_keep = cfg.fake_mode == "lora", keep if cfg.fake_arch == "pruned" else None
    nets = {
        "student": Net(keep, updates=generators, averaged=cfg.ema > 0),
        "fake": Net(fake_keep, updates=critics),
        "teacher": Net(),
    }
    fake_path = None  # a pruned critic runs all the blocks that it has
    if lora:  # the critic is the full teacher with adapters, and skips blocks
        nets["fake"] = Net(updates=critics, adapters=cfg.lora_rank, adapted=fake_keep)
        fake_path = fake_keep
    v_pc, v_pn, v_uc = Route(keep=keep), Route(1, keep, kept_text=True), Route()
    predicted = [[v_pc, v_pn, v_uc]] if cfg.guidance_times == "same" else [[v_pc, v_uc], [v_pc, v_pn]]
    if cfg.teacher_guidance == "embedded":
        predicted = [[v_pc, v_uc]]
    early = (cfg.steps - 1) / 2 if cfg.rollout == "simulate" else 0  # mean number of steps before the exit
    simulated = generators * early + critics * (early + 1)
    if cfg.rollouts == "shared":  # one walk of the ladder for `ratio` critic updates
        simulated = cfg.steps * critics / cfg.ratio
    walked = [
        Walk("student", [Route()], simulated),
        Walk("student", [Route(grad=True)], generators),
        Walk("fake", [Route(keep=fake_path)], generators),
        Walk("fake", [Route(keep=fake_path, grad=True)], critics),
    ]
    for routes in predicted:
        own = [r for r in routes if cfg.strong == "stage2" or r is not v_uc]
        walked.append(Walk("teacher", own, generators))
    if cfg.strong == "original":
        nets["original"] = Net()
        walked.append(Walk("original", [v_uc], generators))
    return Iteration(nets, walked)


METHOD = Method(
    stage="3",
    name="fastlightgen",
    title="Student",
    about="distribution matching under the well-guided teacher (Eq. 8 and 9)",
    keys=DistillKeys,
    build=build,
    walks=walks,
    subject=subject,
    inputs=inputs,
    needs=needs,
    savings=({"fake_mode": "lora"},),
)
