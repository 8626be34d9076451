"""The record that describes a method, one way to run a stage; `--help`, train, plan, evaluate and report read it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlightgen.config import Checked
from fastlightgen.models.cost import Network
from fastlightgen.planner.step import Iteration
from fastlightgen.stages.build import Builder

Guess = Callable[[int], Sequence[int]]  # number of blocks -> the blocks that a future Stage I is assumed to keep
Subject = tuple[dict[str, Any], Sequence[int]]  # config.json of a network, and the blocks of its pruned path


# What a method of Stage II leaves: all blocks with a pruned path; the pruned network alone; one with silenced heads.
BOTH, ALONE, SILENCED = "both paths", "the pruned network alone", "silenced heads"


def both_paths(cfg: Any) -> str:
    return BOTH


def alone(cfg: Any) -> str:
    return ALONE


def nothing(cfg: Any) -> dict[str, Any]:
    """Return no inputs: the stage's result depends on its own configuration alone."""
    return {}


def no_stage(cfg: Any) -> str:
    """Return no stage: this one reads no other stage's result."""
    return ""


@dataclass(frozen=True)
class Method:
    """One way to run a stage."""

    stage: str  # "0" to "3"
    name: str  # method=NAME
    title: str  # name of the resulting model in tables and reports
    about: str  # one line for --help
    keys: type[Checked]  # its keys, a dataclass of fields
    build: Callable[[Any, Builder], Any]  # makes a stage for the loop; for Stage I a model and its blocks' costs
    walks: Callable[[Network, Sequence[int], Any], Iteration]  # the network calls of an iteration, for the planner
    subject: Callable[[Any, Guess | None], Subject]  # the network that the stage starts from
    inputs: Callable[[Any], Mapping[str, Any]] = nothing  # results of earlier stages that affect this one
    needs: Callable[[Any], str] = no_stage  # the stage whose result in the run folder this one reads
    leaves: Callable[[Any], str] = both_paths  # of Stage II: BOTH, ALONE or SILENCED
    unfit: Mapping[str, str] = field(default_factory=dict)  # expert of two that it cannot train -> the reason
    savings: Sequence[Mapping[str, Any]] = field(default=())  # values of its own keys that save memory
