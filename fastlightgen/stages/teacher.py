"""Stage 0: train or adapt a teacher by flow matching (Eq. 1).

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import TIMES, Run, TrainingKeys, field, preset, presets
from fastlightgen.config.training import SCHEDULE
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.weights import read_card, save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like, rand
from fastlightgen.stages.build import Builder
from fastlightgen.stages.method import Guess, Method, Subject

DRAWS = 0  # the purpose of this stage's random draws


@dataclass(kw_only=True)
class TeacherKeys(TrainingKeys):
    """Keys of Stage 0."""

    iters: int = field(2000, "optimizer steps", lo=1, everyday=True)
    lr_schedule: str = field("cosine", SCHEDULE, choices=("constant", "cosine"))
    text_dropout: float = field(0.1, "probability of the empty prompt, which guidance needs", lo=0, hi=1)
    ema: float = field(0.0, "decay of the averaged weights; 0 keeps no average", lo=0, below=1, everyday=True)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)
    init: str = field("", "model folder to start from; empty: random weights of the preset", everyday=True)
    save_dtype: str = field("float32", "type of the saved weights", choices=("float32", "bfloat16"))


class Config(TeacherKeys, Run):
    """A configuration of this stage: its own keys and those of every stage."""


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Eq. 1 with a weight of 1: the mean over elements of |v - v*|^2, v* = noise - x0 (the sign of Eq. 4)."""
    return (v - flow.velocity(x0, noise)).square().mean()


def noised(batch: Batch, cfg: Any, *keys: int) -> tuple[Tensor, Tensor, Tensor, Cond]:
    """Draw times, noise and dropped prompts, as stages 0 and 2 do: return (x_t, t, noise, cond)."""
    gen = generator(*keys)
    size = batch.x0.shape[0]
    t = flow.draw_times(size, cfg.shift, cfg.time, gen, cfg.bounds).to(batch.x0.device)
    cond = batch.drop_text(rand(size, gen) < cfg.text_dropout)
    noise = normal_like(batch.x0, gen)
    return flow.add_noise(batch.x0, noise, t), t, noise, cond


class Teacher:
    """Stage 0 for the loop: one network, one loss."""

    number = 0
    loss_key, drifts = "loss", False
    frozen: Sequence[VideoDiT] = ()
    teacher = None  # the target is the data

    def __init__(self, cfg: Config, net: VideoDiT, batches: Callable[[int], Batch], card: dict[str, Any]):
        self.cfg, self.net, self.batches, self.card, self.iters = cfg, net, batches, card, cfg.iters
        self.roles = {"teacher": Role.of(net, cfg, ema=cfg.ema)}

    def begin(self) -> None:
        """Nothing to measure before training: the target is the data."""

    def updates(self, step: int) -> list[Update]:
        return [Update("teacher", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.batches(step)
        x_t, t, noise, cond = noised(batch, self.cfg, self.cfg.seed, DRAWS, step)
        return flow_matching_loss(self.net(x_t, t, cond), batch.x0, noise), {}

    def check(self, step: int) -> None:
        """Nothing can drift here: the target is the data."""

    def sampler(self) -> dict[str, Any]:
        return {"model": self.net} | preview_plan(self.card, self.cfg.shift, self.net.released)

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        card = {"stage": 0, "shift": self.cfg.shift, "source": self.cfg.data}
        write(self.net, folder, getattr(torch, self.cfg.save_dtype), **self.card | card)


def build(cfg: Config, with_: Builder) -> Teacher:
    """Build the network from `init`, or with random weights of the preset."""
    start = cfg.init or cfg.model
    net = with_.load(start)
    with_.checkpoint(cfg, net)
    card = preset(start)["inference"] if start in presets() else read_card(start)
    with_.check_source(net, card)
    stage = Teacher(cfg, net, with_.batches, with_.card(steps=card.get("steps"), guidance=card.get("guidance")))
    stage.roles["teacher"].file_values = with_.file_values(start)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count one prediction of the full network, with gradient."""
    teacher = Net(updates=1, averaged=cfg.ema > 0, drawn=True)
    return Iteration({"teacher": teacher}, [Walk("teacher", [Route(grad=True)])])


def subject(cfg: Config, guess: Guess | None = None) -> Subject:
    return config_of(cfg.init or cfg.model), ()


METHOD = Method(
    stage="0",
    name="fastlightgen",
    title="Teacher",
    about="flow matching on the data",
    keys=TeacherKeys,
    build=build,
    walks=walks,
    subject=subject,
)
