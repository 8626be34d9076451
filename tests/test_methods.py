"""A method is one declaration: the toy method of this file trains, is planned, and appears in help and reports."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import KEPT, counted, run_train, write_inputs

from fastlightgen import flow
from fastlightgen.config import ConfigError, TrainingKeys, field, load, main, plan_for, register
from fastlightgen.config.stages import METHODS
from fastlightgen.data.source import Batch
from fastlightgen.engine.log import read_metrics
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import load_model, read_card, save_model
from fastlightgen.plan import plan
from fastlightgen.planner.budget import budget
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.report import write_report
from fastlightgen.rng import generator, normal_like, rand
from fastlightgen.stages.build import Builder
from fastlightgen.stages.distill import subject as stage2_subject
from fastlightgen.stages.method import Method
from fastlightgen.stages.start import stage2_result
from fastlightgen.world.source import ShapesSource


@dataclass(kw_only=True)
class ToyKeys(TrainingKeys):
    """The configuration keys of the toy method."""

    steps: int = field(2, "sampling steps of the student", lo=1)
    pull: float = field(0.5, "how strongly the student follows the whole network", above=0, everyday=True)
    stage2_model: str = field("", "model folder that Stage II left; empty: RUN/stage2/model")


def toy_loss(x0_student: torch.Tensor, x0_teacher: torch.Tensor, pull: float) -> torch.Tensor:
    return pull * (x0_student - x0_teacher.detach()).square().mean()


class Toy:
    """The pruned student regresses the x0 estimate of the network with all blocks."""

    number, loss_key, drifts = 3, "loss", True

    def __init__(self, cfg: Any, student: VideoDiT, teacher: VideoDiT, batches: Callable[[int], Batch], card: dict):
        self.cfg, self.iters, self.card = cfg, cfg.iters, card
        self.student, self.teacher, self.frozen, self.batches = student, teacher, [teacher], batches
        self.roles = {"student": Role.of(student, cfg)}

    def begin(self) -> None: ...

    def updates(self, step: int) -> list[Update]:
        return [Update("student", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch, gen = self.batches(step), generator(self.cfg.seed, 20, step)
        t = rand(len(batch.x0), gen).clamp(0.02, 0.98).to(batch.x0.device)
        x_t = flow.add_noise(batch.x0, normal_like(batch.x0, gen), t)
        with torch.no_grad():
            wanted = flow.x0_from_velocity(x_t, self.teacher(x_t, t, batch.cond), t)
        made = flow.x0_from_velocity(x_t, self.student(x_t, t, batch.cond), t)
        return toy_loss(made, wanted, self.cfg.pull), {}

    def check(self, step: int) -> None: ...

    def sampler(self) -> dict[str, Any]:
        times = flow.ladder(self.cfg.steps, self.cfg.shift)
        return {"model": self.student, "times": times, "guidance": 1.0, "kind": "ode"}

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        ladder = flow.ladder(self.cfg.steps, self.cfg.shift)
        write(self.student, folder, **self.card, stage=3, ladder=ladder, shift=self.cfg.shift, guidance=1.0)


def build(cfg: Any, with_: Builder) -> Toy:
    folder = stage2_result(cfg).folder
    keep = read_card(folder)["pruned_path"]
    teacher = with_.load(folder).requires_grad_(False)
    student = with_.copy(teacher, folder).requires_grad_(True).prune(keep)
    with_.checkpoint(cfg, student)
    return Toy(cfg, student, teacher, with_.batches, with_.card(kept_blocks=keep))


def walks(net: Any, keep: Sequence[int], cfg: Any) -> Iteration:
    nets = {"student": Net(keep, updates=1), "teacher": Net()}
    return Iteration(nets, [Walk("teacher", [Route()]), Walk("student", [Route(grad=True)])])


TOY = Method(
    stage="3",
    name="toy",
    title="Toy student",
    about="regress the x0 estimate of the whole network",
    keys=ToyKeys,
    build=build,
    walks=walks,
    subject=stage2_subject,
)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(TOY)
    yield
    del METHODS["3"]["toy"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    model, batch, *_ = (found := write_inputs(tmp_path_factory.mktemp("inputs"))[3])
    stage2 = next(w for w in found if w.startswith("stage2_model="))
    return ["stage=3", "method=toy", model, batch, stage2, "shift=3", "progress=false", "threads=1", "lr=1e-2"]


def test_it_trains(words, tmp_path):
    def run(name: str, *more: str) -> tuple[list[dict], dict]:
        run_train(*words, f"run={tmp_path / name}", "log_every=1", "save_every=2", *more)
        folder = tmp_path / name / "stage3"
        return read_metrics(folder / "metrics.jsonl"), read_card(folder / "model")

    lines, card = run("whole", "iters=6", "steps=2")
    assert lines[-1]["loss"] < lines[0]["loss"] and [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert card["kept_blocks"] == KEPT and card["ladder"] == flow.ladder(2, 3.0)
    assert load_model(tmp_path / "whole" / "stage3" / "model").num_blocks == len(KEPT)


def test_its_keys_are_its_own(words):
    cfg = load([*words, "run=r", "pull=2"])
    assert (cfg.method, cfg.pull, cfg.seed) == ("toy", 2.0, 0)
    other = ["stage=3", "run=r"]
    assert not hasattr(load(other), "pull")
    for given, message in (
        ([*other, "pull=2"], "pull=2: pull is a key of method=toy, not of method=fastlightgen"),
        ([*words, "run=r", "beta1=2"], "beta1=2: beta1 is a key of method=fastlightgen, not of method=toy"),
        ([*words, "run=r", "pull=0"], "pull=0.0: wanted > 0"),
        (["stage=2", "run=r", "method=toy"], "method=toy: stage=2 has no such method; wanted one of fastlightgen"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            load(given)
    whole = load(["stage=all", "run=r", "stage3.method=toy", "stage3.pull=3"])
    assert (whole.stage3.method, whole.stage3.pull, whole.stage2.method) == ("toy", 3.0, "fastlightgen")


def test_help_shows_it(capsys):
    for given in (["--help", "all"], ["--help", "stage=3"], ["--help", "stage=3", "method=toy"]):
        with pytest.raises(SystemExit):
            load(given)
        out = capsys.readouterr().out
        assert re.search(rf"method=toy +{re.escape(TOY.about)}", out)
        assert ("how strongly the student follows" in out) == ("method=toy" in given)


def test_it_is_planned_as_it_runs(words, capsys, tmp_path):
    """A real step has the operations and block evaluations of the declared walks; the plan command uses them."""
    cfg = load([*words, "run=r", "iters=9"])
    stage = build(cfg, Builder(cfg, ShapesSource(0), torch.device("cpu")))
    batch = ShapesSource(0).batch(0, 2)
    stage.batches = lambda step: batch
    cost = network(stage.teacher.config, tuple(batch.x0.shape[2:]), batch.cond.text.shape[1])
    b = budget(cost, plan_for(cfg, gpus=1, gpus_per_node=1, gpu="cpu"), KEPT)
    assert counted(lambda: stage.loss(0)[0].backward()) == b.flops
    assert stage.student.block_calls + stage.teacher.block_calls == b.calls == 4 + len(KEPT)
    assert b.iters == 9
    main(plan, "plan", ["stage=3", "method=toy", "pull=2", "gpus=16", f"out={tmp_path / 'p.json'}"])
    record = json.loads((tmp_path / "p.json").read_text())
    assert (record["pull"], record["plan"]["calls"]) == (2.0, 40 + 28)  # Wan 14B with all blocks, and pruned by 30%
    assert "block evaluations" in capsys.readouterr().out


def test_the_report_names_it(words, tmp_path):
    run_train(*words, f"run={tmp_path}", "iters=2", "log_every=1")
    assert f"Stage 3: {TOY.about}" in write_report(tmp_path).read_text()
