"""What a method is: one record per way to run a stage, read by `--help`, train, plan, evaluate and report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlightgen.config import Checked
from fastlightgen.models.cost import Network
from fastlightgen.planner.step import Iteration
from fastlightgen.stages.build import Builder

Guess = Callable[[int], Sequence[int]]  # number of blocks -> those that a Stage I yet to come is taken to keep
Subject = tuple[dict[str, Any], Sequence[int]]  # config.json of a network, and the blocks of its pruned path


def nothing(cfg: Any) -> dict[str, Any]:
    """A stage whose result depends on its own configuration alone."""
    return {}


@dataclass(frozen=True)
class Method:
    """One way to run a stage."""

    stage: str  # "0" to "3"
    name: str  # method=NAME
    title: str  # of the model that it makes, in tables and reports
    about: str  # one line for --help
    keys: type[Checked]  # its keys, a dataclass of fields
    build: Callable[[Any, Builder], Any]  # from a configuration to a stage for the loop; Stage I: to a model and costs
    walks: Callable[[Network, Sequence[int], Any], Iteration]  # what the planner counts
    subject: Callable[[Any, Guess | None], Subject]  # the network it starts from
    inputs: Callable[[Any], Mapping[str, Any]] = nothing  # what of earlier stages decides the result
    savings: Sequence[Mapping[str, Any]] = field(default=())  # values of its own keys that save memory
