"""What the rivals of Stage III share: the original teacher with plain guidance, and a student with all or some blocks.

The paper compares with methods that know no pruned path. Their teacher is the unpruned network before Stage II. Their
student has all of its blocks (student=full), or starts where this project's student does (student=pruned).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, Checked, ConfigError, field
from fastlightgen.engine.roles import Values
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.families import depth
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.released import sampling
from fastlightgen.models.folder.weights import read_card
from fastlightgen.planner.step import Net
from fastlightgen.planner.walk import Route
from fastlightgen.stages import adapters, start
from fastlightgen.stages.build import Builder
from fastlightgen.stages.experts import partner_used
from fastlightgen.stages.method import Guess, Subject


class Keys(start.Keys, adapters.Keys, Protocol):
    """The keys that this file reads; RivalKeys documents them."""

    student: str
    guidance: float
    teacher_guidance: str
    start_model: str
    expert: str


@dataclass(kw_only=True)
class RivalKeys(Checked):
    """Keys of every rival: which student, and how its teacher is guided."""

    student: str = field(
        "pruned",
        "the student's blocks; pruned: those of Stage II's pruned path, where it starts; full: all of the teacher's, "
        "without Stages I and II",
        choices=("pruned", "full"),
    )
    guidance: float = field(
        -1.0, "guidance w of the teacher, null + w (cond - null); 1 turns it off, a negative number takes its own"
    )
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    stage2_model: str = field("", "student=pruned: model folder that Stage II left; empty: RUN/stage2/model")
    start_model: str = field(
        "", "model folder that the student starts from; empty: Stage II's, or with student=full the teacher's"
    )

    def check(self) -> None:
        super().check()
        if self.student == "full" and self.stage2_model:
            raise ConfigError(
                f"stage2_model={self.stage2_model}: student=full starts from the teacher; leave stage2_model out"
            )
        if self.guidance >= 0 and self.teacher_guidance == "embedded":
            raise ConfigError(
                f"guidance={self.guidance}: teacher_guidance=embedded reads the released scale; leave guidance out"
            )


@dataclass(frozen=True)
class Pair:
    """A frozen teacher, and a student that has some or all of its blocks."""

    teacher: VideoDiT
    student: VideoDiT
    trained: nn.Module  # what trains: the student, or its adapters
    rank: int  # of the adapters
    kept: list[int]  # the teacher's blocks that the student has
    path: list[int]  # the same as the network of `start` numbers them
    scale: float  # the guidance w of the teacher's predictions; 1: they need no null prompt
    read: float | None  # the guidance that all networks read as a number; None: they read none
    folder: Path  # the teacher's
    start: Path  # the student's

    def card(self, with_: Builder) -> dict[str, Any]:
        """The card of the result; `lora_rank`: it is the teacher with adapters of that rank, merged."""
        card = with_.card(source=str(self.folder), kept_blocks=self.kept)
        if self.trained is self.student or self.start != self.folder:
            return card
        return card | {"lora_rank": self.rank}

    def values(self, with_: Builder) -> Values | None:
        """The reader of the student's float32 values; see `Builder.file_values`."""
        return with_.file_values(self.start, self.path) if self.trained is self.student else None


def pair(cfg: Keys, with_: Builder) -> Pair:
    """Load the teacher and the student of a rival."""
    folder = trained_folder(cfg.model)
    card, config = read_card(folder), config_of(folder)
    first = Path(cfg.start_model) if cfg.start_model else folder
    path = kept = list(range(depth(config)))
    if cfg.student == "pruned":
        stage2 = start.stage2_result(cfg)
        start.require_made_of(config, stage2, f"model={cfg.model}")
        origin = start.student_from(cfg.start_model, stage2)
        first, path, kept = origin.folder, origin.path, origin.kept
    elif cfg.start_model:
        start.require_model(first, "of the teacher's network")
        start.require_same(f"start_model={first}", config_of(first), config, f"model={cfg.model}")

    teacher = with_.load(folder).requires_grad_(False)
    with_.check_data(teacher, card)
    if cfg.student == "pruned":
        theirs = read_card(stage2.folder)
        with_.check_source(teacher, theirs)
        with_.read_guidance(cfg.teacher_guidance, teacher, theirs)
    with_.read_guidance(cfg.teacher_guidance, teacher, card)
    student, trained = adapters.make_student(cfg, with_, teacher if first == folder else None, first, path)
    scale = scale_of(cfg, teacher, card)
    return Pair(teacher, student, trained, cfg.student_rank, kept, path, scale, with_.guidance, folder, first)


def scale_of(cfg: Keys, teacher: VideoDiT, card: dict[str, Any]) -> float:
    """Return the guidance w of the teacher's predictions; 1 if it reads its guidance as a number."""
    if cfg.teacher_guidance == "embedded":
        return 1.0
    if cfg.guidance >= 0:
        return cfg.guidance
    known = sampling(cfg.model).values
    own = float(card.get("guidance") or (cfg.expert == "low" and known.get("guidance_2")) or known["guidance"])
    if teacher.embeds_guidance and own != 1:
        raise ValueError(
            f"teacher_guidance=null: this model reads its guidance of {own:g} as a number and may have no null "
            "prediction; use teacher_guidance=embedded, or give guidance=W to guide by the null prompt all the same"
        )
    return own


def predictions(cfg: Keys, *, kept_text: bool = False) -> list[Route]:
    """The streams of the teacher's guided prediction, for the planner; a model's own guidance is taken not to be 1."""
    plain = cfg.guidance == 1 or cfg.teacher_guidance == "embedded"
    return [Route()] if plain else [Route(), Route(1, kept_text=kept_text)]


def blocks(cfg: Keys, keep: Sequence[int]) -> Sequence[int] | None:
    """The student's blocks, for the planner; None: all."""
    return None if cfg.student == "full" else keep


def student_net(cfg: Keys, net: Network, keep: Sequence[int], **more: Any) -> Net:
    """The student as it trains, for the planner; `more`: see Net."""
    shares = cfg.student == "full" and not cfg.start_model
    return like_student(cfg, net, keep, **more, **adapters.planned(cfg, shares))


def like_student(cfg: Keys, net: Network, keep: Sequence[int], **more: Any) -> Net:
    """A network with the student's blocks and widths, for the planner; `more`: see Net."""
    own = start.own_config(cfg) if cfg.student == "pruned" else None
    return Net(blocks(cfg, keep), **more) if own is None else Net(network=net.of(own), **more)


def subject(cfg: Keys, guess: Guess | None = None) -> Subject:
    """Return config.json of the teacher, and its blocks that the student has."""
    if cfg.student == "pruned" and guess and not cfg.stage2_model:
        return start.subject(cfg, guess)
    config = config_of(trained_folder(cfg.model))
    if cfg.student == "full":
        return config, range(depth(config))
    return config, start.stage2_result(cfg).kept


def needs(cfg: Keys) -> str:
    """Return the stage whose result in the run folder is read."""
    return start.needs(cfg) if cfg.student == "pruned" else ""


def inputs(cfg: Keys) -> dict[str, Any]:
    """Return the settings of the run's own Stage II, if the student starts from it, and the partner of an expert."""
    return start.inputs(cfg) if cfg.student == "pruned" else partner_used(cfg)
