"""student_mode=lora: the student is a frozen network with low-rank adapters, which alone train.

Where it starts from the teacher's weights, both networks use one copy of them. Under ZeRO-3 each network is sharded by
an engine of its own, so that the student reads the weights once more; each rank holds its partition of both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from fastlightgen.engine.shards import separate
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.lora import attach_always, lora_copy
from fastlightgen.rng import generator
from fastlightgen.stages.build import Builder

ADAPTERS = 28  # the purpose of this file's random draws


class Keys(Protocol):
    """The keys that this file reads; FewStepKeys and StageConfig document them."""

    seed: int
    engine: str
    zero: int
    student_mode: str
    student_rank: int


def make_student(
    cfg: Keys, with_: Builder, base: VideoDiT | None, folder: Path, path: Sequence[int]
) -> tuple[VideoDiT, nn.Module]:
    """Return the student and the module that trains: the student itself, or its adapters.

    `folder`: the network that it starts from; `base`: the same network if it is loaded and stays frozen. `path`: its
    blocks that the student has.
    """
    if cfg.student_mode == "copy":
        student = with_.copy(base, folder) if base is not None else with_.load(folder)
        student = student.requires_grad_(True).prune(path)
        return student, student
    gen = generator(cfg.seed, ADAPTERS)
    if base is None or separate(cfg):
        student = with_.load(folder).prune(path)
        return student, attach_always(student, cfg.student_rank, gen)
    return lora_copy(base, path, cfg.student_rank, gen)


def planned(cfg: Keys, shares: bool) -> dict[str, Any]:
    """What trains in the student, for the planner (see Net); `shares`: it starts from the teacher's weights."""
    if cfg.student_mode == "copy":
        return {}
    return {"adapters": cfg.student_rank, "apart": not shares or separate(cfg)}
