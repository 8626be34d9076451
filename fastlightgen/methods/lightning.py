"""method=lightning: a width-pruned student, aligned with its teacher at first, then trained on the data alone.

Lightning Video, Sec. 2. Its third part, distillation to four steps, is Stage III (docs/methods/lightning.md).
Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B]; hidden states h [B, L, D].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.blocks import read_importance
from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, TIMES, ConfigError, Run, TrainingKeys, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import Features, Stream, VideoDiT
from fastlightgen.models.cost import Network, Saved, Work
from fastlightgen.models.families import depth, image_states
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import digest, read_card, save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.planner.step import Head, Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.stages.build import Builder
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import Guess, Method, Subject, alone
from fastlightgen.stages.narrow import WidthKeys, narrow_folder, student_config
from fastlightgen.stages.prune import ranking_of
from fastlightgen.stages.start import require_model
from fastlightgen.stages.teacher import flow_matching_loss, noised

DRAWS = 26  # the purpose of this file's random draws


@dataclass(kw_only=True)
class LightningKeys(WidthKeys, TrainingKeys):
    """Keys of Lightning Video's training."""

    iters: int = field(20000, "optimizer steps of both parts", lo=1, everyday=True)
    lr: float = field(1e-4, "learning rate", lo=0, everyday=True)
    align: float = field(
        0.5, "share of the steps, from the first one on, that align the student with its teacher", lo=0, hi=1
    )
    align_output: float = field(1.0, "Eq. 7: weight of the distance between predictions (Eq. 5)", lo=0)
    align_layers: float = field(1.0, "Eq. 7: weight of the distance between hidden states (Eq. 6)", lo=0)
    align_every: int = field(5, "Eq. 6: every so many blocks of the student, one is aligned", lo=1)
    student: str = field(
        "full",
        "the student's blocks; full: all of the teacher's (the paper's); pruned: those that Stage I keeps",
        choices=("full", "pruned"),
        everyday=True,
    )
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    text_dropout: float = field(0.1, "probability of the empty prompt, which guidance needs", lo=0, hi=1)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)
    importance: str = field("", "student=pruned: Stage I's ranking; empty: RUN/stage1/importance.json")
    teacher: str = field("", "model folder of the teacher; empty: model")

    def check(self) -> None:
        super().check()
        if self.start_model and self.student == "pruned":
            raise ConfigError(f"start_model={self.start_model}: has blocks of its own; leave student=pruned out")
        if not (self.prune_ffn or self.prune_heads or self.start_model or self.student == "pruned"):
            raise ConfigError("prune_ffn=0, prune_heads=0: nothing is pruned; give one of them, or student=pruned")

    @property
    def aligned_steps(self) -> int:
        """The number of steps before flow matching goes on alone."""
        return round(self.align * self.iters)


class Config(LightningKeys, Run):
    """A configuration of this method: its own keys and those of every stage."""


def output_alignment(v: Tensor, v_teacher: Tensor) -> Tensor:
    """Eq. 5: the mean over elements of |v - SG(v_teacher)|^2."""
    return distance(v, v_teacher.detach())


def layer_alignment(h: Sequence[Tensor], h_teacher: Sequence[Tensor]) -> Tensor:
    """Eq. 6: the sum over the aligned layers of the mean over elements of |h - SG(h_teacher)|^2; without layer: 0."""
    return torch.stack([distance(a, b.detach()) for a, b in zip(h, h_teacher, strict=True)]).sum()


def alignment_loss(
    v: Tensor,
    v_teacher: Tensor,
    h: Sequence[Tensor],
    h_teacher: Sequence[Tensor],
    x0: Tensor,
    noise: Tensor,
    weight_output: float,
    weight_layers: float,
) -> Tensor:
    """Eq. 7: L_FM + lambda_output L_output + lambda_layer L_layer, for the first part of the training.

    L_FM is Eq. 4 without its division by t, a misprint, and with the sign of this project: v* = noise - x0. The second
    part is L_FM alone (Eq. 8).
    """
    loss = flow_matching_loss(v, x0, noise) + weight_output * output_alignment(v, v_teacher)
    return loss + weight_layers * layer_alignment(h, h_teacher) if h else loss


def aligned_pairs(keep: Sequence[int], teacher_blocks: int, every: int) -> dict[int, int]:
    """Map the student's aligned blocks, every `every`-th one, to the teacher's blocks whose outputs they follow.

    `keep`: the teacher's blocks that the student has. The output of block j of the student is read by its next block.
    In the teacher that block reads the output of block keep[j + 1] - 1: the student learns to make up for the gap.
    """
    ends = [*(i - 1 for i in keep[1:]), teacher_blocks - 1]
    return {j: ends[j] for j in range(every - 1, len(keep), every)}


class Lightning:
    """The student and, while it is aligned, its teacher for the loop."""

    number = 2
    loss_key, drifts = "loss", False

    def __init__(
        self,
        cfg: Config,
        net: VideoDiT,
        teacher: VideoDiT | None,
        pairs: Mapping[int, int],
        batches: Callable[[int], Batch],
        card: dict[str, Any],
    ):
        """`teacher`: None if no step aligns; `pairs`: student's block -> teacher's block."""
        self.cfg, self.iters, self.card, self.batches = cfg, cfg.iters, card, batches
        self.net, self.teacher, self.pairs = net, teacher, dict(pairs)
        self.frozen = [] if teacher is None else [teacher]
        self.roles = {"student": Role.of(net, cfg)}

    def begin(self) -> None:
        """Nothing to measure before training."""

    def updates(self, step: int) -> list[Update]:
        return [Update("student", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        cfg, batch = self.cfg, self.batches(step)
        x_t, t, noise, cond = noised(batch, cfg, cfg.seed, DRAWS, step)
        if self.teacher is None or step >= cfg.aligned_steps:
            return flow_matching_loss(self.net(x_t, t, cond), batch.x0, noise), {}  # Eq. 8
        h, h_teacher = Features(self.pairs), Features(self.pairs.values())
        (v,) = self.net.walk(x_t, t, [Stream(cond, grad=True, features=h)])
        with torch.no_grad():
            (v_teacher,) = self.teacher.walk(x_t, t, [Stream(cond, features=h_teacher)])
        hidden = [h[i] for i in self.pairs], [h_teacher[i] for i in self.pairs.values()]
        loss = alignment_loss(v, v_teacher, *hidden, batch.x0, noise, cfg.align_output, cfg.align_layers)
        with torch.no_grad():
            record = {"align_output": output_alignment(v, v_teacher).item()}
            record |= {"align_layers": layer_alignment(*hidden).item()} if self.pairs else {}
        return loss, record

    def check(self, step: int) -> None:
        """Nothing can drift here: data and teacher are fixed."""

    def sampler(self) -> dict[str, Any]:
        return {"model": self.net} | preview_plan(self.card, self.cfg.shift, self.net.released)

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        write(self.net, folder, **self.card | {"stage": 2, "shift": self.cfg.shift})


def needs(cfg: Config) -> str:
    return "1" if cfg.student == "pruned" and not cfg.importance else ""


def kept_blocks(cfg: Config, blocks: int, start: Path | None) -> list[int]:
    """Return the teacher's blocks that the student has."""
    if start is None:
        return read_importance(ranking_of(cfg), blocks)["kept"] if cfg.student == "pruned" else list(range(blocks))
    require_model(start, "that width pruning made")
    keep, own = read_card(start).get("kept_blocks") or [], depth(config_of(start))
    if len(keep) != own or max(keep) >= blocks:
        raise ValueError(
            f"start_model={start}: its {own} blocks are not some of the teacher's {blocks}; "
            "give a student of this teacher"
        )
    return keep


def build(cfg: Config, with_: Builder) -> Lightning:
    """Prune the teacher, or take the pruned network start_model; the student is read from that folder."""
    folder = trained_folder(cfg.teacher or cfg.model)
    theirs, start = read_card(folder), Path(cfg.start_model) if cfg.start_model else None
    keep = kept_blocks(cfg, depth(config_of(folder)), start)
    if cfg.student == "pruned":
        with_.ranking(ranking_of(cfg), depth(config_of(folder)))  # raises if it is of another version of the world
    teacher = with_.load(folder).requires_grad_(False)
    with_.read_guidance(cfg.teacher_guidance, teacher, theirs)
    with_.check_data(teacher, theirs)
    start = start or narrow_folder(cfg, with_, teacher, folder, keep)
    student = with_.load(start)
    if student.family != teacher.family or student.cfg.dim != teacher.cfg.dim:
        raise ValueError(
            f"start_model={start}: its hidden states are {student.cfg.dim} wide ({student.family}), the teacher's "
            f"{teacher.cfg.dim} ({teacher.family}): they cannot be compared; give a student of this teacher"
        )
    with_.checkpoint(cfg, student)
    widths = {"heads": [student.cfg.heads, teacher.cfg.heads], "ffn": [student.cfg.ffn_width, teacher.cfg.ffn_width]}
    card = with_.card(
        source=str(folder),
        steps=theirs.get("steps"),
        guidance=theirs.get("guidance"),
        kept_blocks=list(keep),
        widths=widths,
    )
    pairs = aligned_pairs(keep, teacher.num_blocks, cfg.align_every)
    stage = Lightning(cfg, student, teacher if cfg.aligned_steps else None, pairs, with_.batches, card)
    stage.roles["student"].file_values = with_.file_values(start)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the student's prediction and, while it is aligned, the teacher's."""
    blocks = len(net.blocks)
    config = student_config(cfg, net.config)
    own = keep if cfg.student == "pruned" else None  # start_model names a network that is as deep as its config says
    pairs = aligned_pairs(keep if own or cfg.start_model else range(blocks), blocks, cfg.align_every)
    kept = Head(0, Work(), Saved(0, len(pairs) * image_states(net)))  # the differences of hidden states, in float32
    student = Net(own, updates=1, network=net.of(config), head=kept)
    share = cfg.aligned_steps / cfg.iters
    walked = [Walk("student", [Route(grad=True)], share, head=True)] if share else []
    walked += [Walk("student", [Route(grad=True)], 1 - share)] if share < 1 else []
    if not share:
        return Iteration({"student": student}, walked)
    return Iteration({"student": student, "teacher": Net()}, [*walked, Walk("teacher", [Route()], share)])


def subject(cfg: Config, guess: Guess | None = None) -> Subject:
    """Return the teacher's config.json and its blocks that the student has."""
    config = config_of(trained_folder(cfg.teacher or cfg.model))
    if guess and cfg.student == "pruned" and not cfg.importance:
        return config, guess(depth(config))
    return config, kept_blocks(cfg, depth(config), Path(cfg.start_model) if cfg.start_model else None)


def inputs(cfg: Config) -> dict[str, Any]:
    ranking = ranking_of(cfg)
    return {"ranking_used": digest(ranking)} if cfg.student == "pruned" and ranking.is_file() else {}


METHOD = Method(
    stage="2",
    name="lightning",
    title="Lightning Video",
    about="fewer heads and a narrower feed-forward; aligned with the teacher, then flow matching",
    keys=LightningKeys,
    build=build,
    walks=walks,
    subject=subject,
    inputs=inputs,
    needs=needs,
    leaves=alone,
)
