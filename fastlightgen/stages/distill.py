"""Stage III: distribution matching under a well-guided teacher (Eq. 8 and 9); trains a pruned few-step student.

Shapes: x0, x_hat, x_t, noise [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlightgen.config import field
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import read_card
from fastlightgen.models.lora import attach_lora
from fastlightgen.parallel.log import say
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator
from fastlightgen.stages import adapters
from fastlightgen.stages.build import Builder
from fastlightgen.stages.experts import partner, partner_net, rollout_walks
from fastlightgen.stages.guided import student_gradient
from fastlightgen.stages.keys import MatchingKeys
from fastlightgen.stages.matching import dmd_loss
from fastlightgen.stages.method import Method
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.rollouts import STUDENT
from fastlightgen.stages.start import inputs, needs, own_config, stage2_result, student_from, subject
from fastlightgen.stages.student import Matching, MatchingConfig, look

ADAPTERS = 7  # the purpose of this file's own random draws; those of the updates stand in rollouts.py


@dataclass(kw_only=True)
class DistillKeys(MatchingKeys):
    """Keys of Stage III."""

    beta1: float = field(3.5, "Eq. 9: weight of the prompt, v_pc - v_pn; the centre of its interval", everyday=True)
    beta2: float = field(
        0.25, "Eq. 9: weight of the strong teacher, v_uc - v_pc; the centre of its interval", everyday=True
    )
    a1: float = field(1.0, "beta1 is drawn from [beta1 - a1, beta1 + b1]", lo=0)
    b1: float = field(1.0, "see a1", lo=0)
    a2: float = field(0.1, "beta2 is drawn from [beta2 - a2, beta2 + b2]", lo=0)
    b2: float = field(0.1, "see a2", lo=0)
    fake_arch: str = field("pruned", "blocks of the critic", choices=("pruned", "full"))
    fake_mode: str = field(
        "copy",
        "the critic's weights; copy: its own; lora: low-rank adapters on those of Stage II",
        choices=("copy", "lora"),
        everyday=True,
    )
    lora_rank: int = field(16, "fake_mode=lora: rank of the critic's adapters", lo=1, hi=10_000)
    guidance_times: str = field(
        "below",
        "when Eq. 9's guidance part (beta1 - 1) (v_pc - v_pn) is taken; same: at the time of the other part; below: at "
        "cleaner times than the rung that the student left (Decoupled DMD); above: at noisier ones; "
        "teacher_guidance=embedded has no such part",
        choices=("same", "below", "above"),
    )
    strong: str = field(
        "stage2", "the strong teacher in Eq. 9; original: before Stage II", choices=("stage2", "original")
    )

    @property
    def two_times(self) -> bool:
        """Whether Eq. 9's guidance part has a time of its own."""
        return self.guidance_times != "same" and self.teacher_guidance != "embedded"

    @property
    def adapters(self) -> int:
        return self.lora_rank if self.fake_mode == "lora" else 0


class Config(DistillKeys, MatchingConfig):
    """A configuration of this stage: its own keys and those of every stage."""


class Distill(Matching):
    """Stage III for the loop: the student, the critic ("fake") and their frozen teachers."""

    cfg: Config

    def student_loss(self, g: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 8 and 9, for the student's update g. No gradient flows through x_t into the two scores."""
        cfg = self.cfg
        gen = generator(cfg.seed, STUDENT, self.order.next_critic(g))
        x_hat, batch, rung = self.rollouts.for_student(g, gen)
        x0 = x_hat.detach()
        with torch.no_grad():
            gradient, normaliser = student_gradient(cfg, self.nets, x0, batch, self.times[rung], gen)
        return dmd_loss(x_hat, gradient), look(x0, batch, normaliser, rung)


def build(cfg: Config, with_: Builder) -> Distill:
    """Build teacher, student and critic from Stage II's folder, and with strong=original the original teacher."""
    result = stage2_result(cfg)
    folder, path, card = result.folder, result.path, read_card(result.folder)
    start = student_from(cfg.start_model, result)
    if result.alone and cfg.strong == "stage2":
        raise ValueError(f"{folder}: holds the pruned network alone, Eq. 9 needs a strong teacher; use strong=original")
    teacher = with_.load(folder).requires_grad_(False)
    with_.check_data(teacher, card)
    with_.read_guidance(cfg.teacher_guidance, teacher, card)
    student, own = adapters.make_student(cfg, with_, None if cfg.start_model else teacher, start.folder, start.path)
    original = None
    if cfg.strong == "original":
        original = with_.load(trained_folder(cfg.model)).requires_grad_(False)
    fake_keep = path if cfg.fake_arch == "pruned" else None
    fake, trained = teacher, None
    if cfg.fake_mode == "lora":  # the critic is the teacher with adapters, which are off in the teacher's predictions
        trained = attach_lora(teacher, cfg.lora_rank, generator(cfg.seed, ADAPTERS))
    else:
        fake = with_.copy(teacher, folder).requires_grad_(True)
        fake, fake_keep = (fake.prune(path), None) if fake_keep is not None else (fake, None)
    with_.checkpoint(cfg, student, fake)
    say(f"learning rates: student {cfg.own_lr:g}, critic {cfg.critic_lr:g}")
    nets = Networks(student, teacher, path, fake, fake_keep, trained or fake, trained is not None, original)
    nets.scale, nets.partner, nets.trained = with_.guidance, partner(cfg, with_), own
    stage = Distill(cfg, nets, with_.batches, with_.card(source=card.get("source"), kept_blocks=result.kept))
    if own is student:  # adapters start from values of their own
        stage.roles["student"].file_values = with_.file_values(start.folder, start.path)
    if trained is None:
        stage.roles["fake"].file_values = with_.file_values(folder, path if cfg.fake_arch == "pruned" else None)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the rollouts, the student's update (Eq. 9) and the critic's."""
    students, critics = cfg.updates
    lora, fake_keep = cfg.fake_mode == "lora", keep if cfg.fake_arch == "pruned" else None
    nets = {
        "student": Net(keep, updates=students, averaged=cfg.ema > 0, **adapters.planned(cfg, not cfg.start_model)),
        "fake": Net(fake_keep, updates=critics),
        "teacher": Net(),
    }
    fake_path = None  # a pruned critic runs all the blocks that it has
    if lora:  # the critic is the full teacher with adapters, and skips blocks
        nets["fake"] = Net(updates=critics, adapters=cfg.lora_rank, adapted=fake_keep)
        fake_path = fake_keep
    v_pc, v_pn, v_uc = Route(keep=keep), Route(1, keep, kept_text=True), Route()
    predicted = [[v_pc, v_uc], [v_pc, v_pn]] if cfg.two_times else [[v_pc, v_pn, v_uc]]
    if cfg.teacher_guidance == "embedded":
        predicted = [[v_pc, v_uc]]
    nets |= partner_net(cfg, net, nets["student"])
    walked = [
        *rollout_walks(cfg),
        Walk("student", [Route(grad=True)], students),
        Walk("fake", [Route(keep=fake_path)], students),
        Walk("fake", [Route(keep=fake_path, grad=True)], critics),
    ]
    for routes in predicted:
        own = [r for r in routes if cfg.strong == "stage2" or r is not v_uc]
        walked.append(Walk("teacher", own, students))
    if cfg.strong == "original":
        alone = own_config(cfg) is not None  # then `net` is not the original's
        nets["original"] = Net(network=net.of(config_of(trained_folder(cfg.model))) if alone else None)
        walked.append(Walk("original", [v_uc], students))
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
