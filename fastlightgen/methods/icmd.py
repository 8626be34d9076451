"""method=icmd: a pruned student follows the teacher's hidden states and fools a discriminator (VDMini, Wu et al. 2025).

Individual content: the student's hidden states follow the teacher's, layer by layer (ICD, Eq. 4). Motion: a
discriminator over space and time tells the student's clean clips from the teacher's (MCA, Eq. 5). Both join the loss of
the task, which is flow matching here, as in the paper's HunyuanVideo (Eq. 6). The numbers are that paper's.

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B]; hidden states [B, L, D]; logits [heads, B, L].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, TIMES, Run, TrainingKeys, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import Cond, Features, Stream, VideoDiT
from fastlightgen.models.constant import constant
from fastlightgen.models.cost import Network, Saved, Work
from fastlightgen.models.families import image_states
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import read_card, save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.parallel.log import say
from fastlightgen.planner.step import Head, Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like, randn
from fastlightgen.stages import frame_heads, prune, start
from fastlightgen.stages.adversarial import pushed, twice
from fastlightgen.stages.build import Builder
from fastlightgen.stages.discriminator import generator_loss
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import Method, alone
from fastlightgen.stages.teacher import flow_matching_loss, noised

DRAWS, HEADS, INSTANCE = 20, 21, 22  # the purposes of this file's random draws


@dataclass(kw_only=True)
class IcmdKeys(TrainingKeys):
    """Keys of ICMD."""

    iters: int = field(30000, "optimizer steps of the student", lo=1, everyday=True)
    lr: float = field(5e-6, "learning rate of the student", lo=0, everyday=True)
    lr_discriminator: float = field(0.0, "learning rate of the discriminator; 0: twice lr, as in the paper", lo=0)
    icd: float = field(0.1, "weight of the distance between hidden states (lambda_ICD)", lo=0, everyday=True)
    pair: str = field(
        "next_input",
        "the teacher's hidden states that a kept block's output follows; next_input: those that the next kept block "
        "got in the teacher; same_index: those after the same block",
        choices=("next_input", "same_index"),
    )
    mca: float = field(1.0, "weight of the adversarial loss (lambda_MCA); 0: no discriminator", lo=0, everyday=True)
    mca_start: float = field(0.3, "share of the steps before the adversarial loss begins", lo=0, below=1)
    mca_every: int = field(4, "the discriminator reads every so many blocks of the teacher", lo=1)
    mca_mean: float = field(
        -1.0, "the discriminator sees clips noised to t' = s / (1 + s), log s ~ N(mca_mean, mca_std^2)"
    )
    mca_std: float = field(1.0, "see mca_mean", lo=0)
    text_dropout: float = field(0.1, "probability of the empty prompt, which guidance needs", lo=0, hi=1)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    importance: str = field("", "Stage I's ranking; empty: RUN/stage1/importance.json")
    teacher: str = field("", "model folder of the teacher; empty: model")
    start_model: str = field("", "unpruned model folder that the student starts from; empty: the teacher's")

    @property
    def adversarial_steps(self) -> range:
        """The steps with the adversarial loss."""
        return range(round(self.mca_start * self.iters) if self.mca else self.iters, self.iters)


class Config(IcmdKeys, Run):
    """A configuration of this method: its own keys and those of every stage."""


def paired(keep: Sequence[int], num_blocks: int, pair: str) -> list[int]:
    """The block of the teacher whose output each kept block follows; see the key `pair`."""
    if pair == "same_index":
        return list(keep)
    return [after - 1 for _, after in pairwise([*keep, num_blocks])]


def icd_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Eq. 4: the sum over layers of d(f_l^stu, f_l^tea), d the mean over elements of the squared difference.

    It empties the two lists. Its graph keeps one tensor for each layer: the gradient, in the type of the states.
    """
    total = teacher[0].new_zeros((), dtype=torch.promote_types(teacher[0].dtype, torch.float32))
    assert len(student) == len(teacher)
    while student:
        s, t = student.pop(), teacher.pop()
        with torch.no_grad():
            gradient = (s.to(total.dtype) - t.to(total.dtype)).mul_(2 / s.numel()).to(s.dtype)
            value = distance(s, t)
        total = total + pushed(s, value, gradient)
    return total


def mca_loss(fake: Tensor) -> Tensor:
    """Eq. 5, the student's side: -E log D(fake) with D = sigmoid(logit)."""
    return generator_loss(fake)


def judge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Eq. 5, the discriminator's side: E max(0, 1 + D(fake)) + E max(0, 1 - D(real)), D the logit itself."""
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


def instance_times(size: int, mean: float, std: float, gen: torch.Generator) -> Tensor:
    """The times t' of Eq. 5's instance noise: noise levels s of EDM, log-normal, as one of 1 to 999 thousandths.

    There x = x0 + s noise; divided by 1 + s it is our x_t at t = s / (1 + s).
    """
    s = (mean + std * randn(size, gen)).exp()
    return (1000 * s / (1 + s)).round().clamp(1, 999) / 1000


def states(net: VideoDiT, x_t: Tensor, t: Tensor, stream: Stream) -> tuple[Tensor, list[Tensor]]:
    """The prediction of a stream and the hidden states that it keeps, in the order of the blocks."""
    assert stream.features is not None
    (v,) = net.walk(x_t, t, [stream])
    return v, list(stream.features.values())


class Icmd:
    """The student, its frozen teacher and the discriminator in the teacher, for the loop."""

    number = 2
    drifts = False

    def __init__(
        self,
        cfg: Config,
        student: VideoDiT,
        teacher: VideoDiT,
        keep: Sequence[int],
        batches: Callable[[int], Batch],
        card: dict[str, Any],
        judge: frame_heads.FrameDiscriminator | None,
    ):
        self.cfg, self.iters, self.card, self.batches = cfg, cfg.iters, card, batches
        self.student, self.teacher, self.judge = student, teacher, judge
        self.followed = paired(keep, teacher.num_blocks, cfg.pair)
        self.roles = {"student": Role.of(student, cfg)}
        self.frozen = [teacher] if judge is None else []
        self.loss_key = "task"  # the other terms begin later or change their scale
        if judge is not None:
            self.loss_key = "student_task"
            lr = cfg.lr_discriminator or 2 * cfg.lr
            self.roles["discriminator"] = Role.of(judge, cfg, lr, host=teacher)
        # The clips of a step, one entry for each part of the batch: the student's update leaves them to the
        # discriminator's. (x0 of the student, x0 of the teacher, prompts)
        self.made: list[tuple[Tensor, Tensor, Cond]] = []

    def begin(self) -> None:
        """Nothing to measure before training."""

    def check(self, step: int) -> None:
        """Nothing to check beyond the loop's own checks: the data anchor the student."""

    def updates(self, step: int) -> list[Update]:
        self.made.clear()
        judged = [Update("discriminator", partial(self.judge_update, step))] if self.adversarial(step) else []
        return [Update("student", partial(self.student_update, step)), *judged]

    def adversarial(self, step: int) -> bool:
        return step in self.cfg.adversarial_steps

    def student_update(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 6 without the discriminator's own loss. Student and teacher see the same x_t, t and prompts."""
        cfg, batch = self.cfg, self.batches(step)
        x_t, t, noise, cond = noised(batch, cfg, cfg.seed, DRAWS, step)
        v, own = states(self.student, x_t, t, Stream(cond, grad=True, features=Features(range(len(self.followed)))))
        with torch.no_grad():
            v_teacher, theirs = states(self.teacher, x_t, t, Stream(cond, features=Features(self.followed)))
        task, icd = flow_matching_loss(v, batch.x0, noise), icd_loss(own, theirs)
        loss, record = task + cfg.icd * icd, {"task": task.item(), "icd": icd.item()}
        if self.adversarial(step):
            x0 = flow.x0_from_velocity(x_t, v, t)
            self.made.append((x0.detach(), flow.x0_from_velocity(x_t, v_teacher, t), cond))
            adversarial, push = self.push(x0.detach(), cond, step)
            loss = loss + cfg.mca * pushed(x0, adversarial, push)
            record["mca"] = adversarial.item()
        return loss, record

    def push(self, x0: Tensor, cond: Cond, step: int) -> tuple[Tensor, Tensor]:
        """The student's adversarial loss and its gradient for x0, through the teacher and the heads as constants."""
        t, noise = self.instance(x0, step)
        with constant(self.teacher):
            x = x0.clone().requires_grad_(True)
            loss = mca_loss(self.logits(flow.add_noise(x, noise, t), t, cond, grad=True))
            (gradient,) = torch.autograd.grad(loss, x)
        return loss.detach(), gradient

    def judge_update(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 5, the discriminator's side, on the clips of the student's update, with the same instance noise."""
        x0, x0_teacher, cond = self.made.pop(0)
        t, noise = self.instance(x0, step)
        both = torch.cat([flow.add_noise(x, noise, t) for x in (x0, x0_teacher)])
        logits = self.logits(both, torch.cat([t, t]), twice(cond, len(t)))
        fake, real = logits.chunk(2, 1)
        return judge_loss(real, fake), {"real": real.mean().item(), "generated": fake.mean().item()}

    def instance(self, x0: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Draw t' and the noise with which the discriminator sees the clips of a step."""
        cfg, gen = self.cfg, generator(self.cfg.seed, INSTANCE, step)
        return instance_times(len(x0), cfg.mca_mean, cfg.mca_std, gen).to(x0.device), normal_like(x0, gen)

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond, grad: bool = False) -> Tensor:
        """The logits of the heads; with `grad` gradients flow to x_t."""
        assert self.judge is not None
        features = Features(self.judge.blocks)
        self.teacher.walk(x_t, t, [Stream(cond, range(self.judge.depth), grad, features=features)])
        return self.judge(features, frame_heads.grid_of(self.teacher, x_t), self.teacher.sequence)

    def sampler(self) -> dict[str, Any]:
        return {"model": self.student} | preview_plan(self.card, self.cfg.shift, self.student.released)

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        write(self.student, folder, **self.card | {"stage": 2, "shift": self.cfg.shift})


def build(cfg: Config, with_: Builder) -> Icmd:
    folder = trained_folder(cfg.teacher or cfg.model)
    first = Path(cfg.start_model) if cfg.start_model else folder
    if cfg.start_model:
        start.require_model(first, "of the teacher's network")
        start.require_same(f"start_model={first}", config_of(first), config_of(folder), str(folder))
    teacher, theirs = with_.load(folder).requires_grad_(False), read_card(folder)
    keep = with_.ranking(prune.ranking_of(cfg), teacher.num_blocks)["kept"]
    with_.read_guidance(cfg.teacher_guidance, teacher, theirs)
    with_.check_data(teacher, theirs)
    student = with_.load(first) if cfg.start_model else with_.copy(teacher, folder)
    student = student.requires_grad_(True).prune(keep)
    judge = frame_heads.attach(teacher, cfg.mca_every, generator(cfg.seed, HEADS)) if cfg.mca else None
    with_.checkpoint(cfg, student, teacher)
    if judge is not None:
        say(f"the adversarial loss begins at step {cfg.adversarial_steps.start + 1} of {cfg.iters}")
    card = with_.card(source=str(folder), steps=theirs.get("steps"), guidance=theirs.get("guidance"), kept_blocks=keep)
    stage = Icmd(cfg, student, teacher, keep, with_.batches, card, judge)
    stage.roles["student"].file_values = with_.file_values(first, keep)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the student's prediction, the teacher's, and from mca_start on the discriminator's of both clips."""
    late = len(cfg.adversarial_steps) / cfg.iters
    # Of each layer the gradient of its hidden states, and these themselves unless checkpointing keeps them anyway.
    # Processes that share a clip's tokens join the states that they compare.
    kept_anyway = cfg.checkpointing and cfg.sequence_parallel == 1
    followed = Head(0, Work(), Saved((1 if kept_anyway else 2) * len(keep) * image_states(net), 0))
    judging = "discriminator" if cfg.mca else "teacher"
    nets = {"student": Net(keep, updates=1, head=followed), judging: Net()}
    walked = [Walk("student", [Route(grad=True)], head=True), Walk(judging, [Route()])]
    if cfg.mca:
        head = frame_heads.cost(net, cfg.mca_every, kept_anyway)
        read = range(frame_heads.read_blocks(len(net.blocks), cfg.mca_every)[-1] + 1)
        nets[judging] = Net(updates=late, head=head, fixed=True)
        walked += [
            Walk(judging, [Route(keep=read, grad=True)], late, head=True, beside="student"),
            Walk(judging, [Route(keep=read)], late, joined=2, head=True),
        ]
    return Iteration(nets, walked)


METHOD = Method(
    stage="2",
    name="icmd",
    title="ICMD",
    about="a pruned student follows the teacher's hidden states, with a discriminator over space and time (VDMini)",
    keys=IcmdKeys,
    build=build,
    walks=walks,
    subject=prune.subject,
    inputs=prune.inputs,
    needs=prune.needs,
    leaves=alone,
    savings=({"mca_every": 20},),
)
