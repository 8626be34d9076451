"""Alarms of a run: their lines, the checkpoint that they keep, how they end the run; training computes the same."""

import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_same, result, run_train, write_inputs

from fastlightgen.engine import checkpoint, watch
from fastlightgen.engine.checkpoint import steps
from fastlightgen.engine.log import read_metrics
from fastlightgen.engine.preview import Preview
from fastlightgen.metrics import drift
from fastlightgen.models.folder.weights import load_model, read_card, save_model, trained_folder
from fastlightgen.models.sample import preview_plan
from fastlightgen.stages.distill import Distill
from fastlightgen.world.builtin import BuiltIn
from fastlightgen.world.source import ShapesSource

FROZEN = "motion collapse: motion of the clips"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return ["stage=3", *write_inputs(tmp_path_factory.mktemp("inputs"))[3], "keep=1", "sample_every=3"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The result of a run without alarms."""
    run = tmp_path_factory.mktemp("whole")
    run_train(*words, f"run={run}", "alarms=off", "sample_every=0")
    return result(run, 3)


@pytest.fixture
def frozen_from(monkeypatch):
    """Make clips look like real ones before a step, and have no motion from that step on."""

    def write(self, folder, step, how, stopped, start):
        return [x | {"motion": x["motion"] * (step < start)} for x in self.real()[:4]]

    def set_up(start: int) -> None:
        monkeypatch.setattr(Preview, "write", lambda *args: write(*args, start))

    return set_up


def growing_from(step: int, monkeypatch) -> None:
    """Multiply the critic's loss by 32 from a step on; let alarms judge few lines, and bear a random student."""
    real = Distill.critic_loss
    monkeypatch.setattr(drift, "Limits", partial(drift.Limits, first=3, recent=2, contrast_high=10.0))

    def critic_loss(self, at):
        loss, record = real(self, at)
        return loss * (32.0 if at + 1 >= step else 1.0), record

    monkeypatch.setattr(Distill, "critic_loss", critic_loss)


def stops(capsys, *command: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_train(*command)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: alarms=stop: ") and err.count("\n") == 1
    return err


def test_stop_keeps_the_last_good_checkpoint_and_says_how_to_go_on(words, whole, tmp_path, frozen_from, capsys):
    command, folder = [*words, f"run={tmp_path}", "alarms=stop"], tmp_path / "stage3"
    frozen_from(6)
    line = stops(capsys, *command)
    usual = read_metrics(folder / "alarms.jsonl")[0]["usual"]
    assert f"step 6: {FROZEN} (0, usual {usual:.3g})" in line
    assert f"the last checkpoint before it is {folder}/checkpoints/step-000003; give alarms=warn" in line
    assert steps(folder / "checkpoints") == [3, 6] and not (folder / "model").exists()

    # the same command again does not slip past the alarm
    assert f"step 6: {FROZEN}; the last checkpoint before it is {folder}/checkpoints/step-000003" in stops(
        capsys, *command
    )
    assert steps(folder / "checkpoints") == [3, 6]

    run_train(*command[:-1], "alarms=warn")
    out = capsys.readouterr().out
    assert f"alarm: step 7: {FROZEN}" in out
    reminder = f"stage 3: 2 alarms, the first at step 6: {FROZEN} (0, usual {usual:.3g}); see {folder}/alarms.jsonl"
    assert reminder in out.splitlines()[-3:]  # the folder of the model and the next command follow
    assert steps(folder / "checkpoints") == [3, 7]  # keep=1, and the good one
    assert [(a["step"], a["alarm"], a["good"]) for a in read_metrics(folder / "alarms.jsonl")] == [
        (6, FROZEN, 3), (7, FROZEN, 3),
    ]  # fmt: skip
    got = result(tmp_path, 3)
    for key in ("model", "state", "metrics"):
        assert_same(got[key], whole[key])


def test_from_the_good_checkpoint_the_alarm_is_forgotten(words, whole, tmp_path, frozen_from, capsys):
    command, folder = [*words, f"run={tmp_path}", "alarms=stop"], tmp_path / "stage3"
    frozen_from(6)
    stops(capsys, *command)
    shutil.rmtree(folder / "checkpoints/step-000006")
    frozen_from(100)
    run_train(*command)
    assert read_metrics(folder / "alarms.jsonl") == []
    assert [line["step"] for line in read_metrics(folder / "samples.jsonl")] == [3, 6, 7]
    assert_same(result(tmp_path, 3)["model"], whole["model"])


def test_an_alarm_of_the_first_clips(words, tmp_path, frozen_from, capsys):
    """The clips of step 3 are bad. With save_every=2 the newest checkpoint before them is that of step 2."""
    frozen_from(1)
    line = stops(capsys, *words, f"run={tmp_path}/a", "alarms=stop", "save_every=2")
    assert "step 3" in line and "checkpoints/step-000002" in line
    assert "there is no checkpoint before it" in stops(capsys, *words, f"run={tmp_path}/b", "alarms=stop")


@pytest.fixture
def slow_disk(monkeypatch):
    """Make the writing of a step's checkpoint, and of later ones, wait until an alarm has been printed."""
    shown, write, show = threading.Event(), checkpoint.write, watch.say

    def say(text: str) -> None:
        show(text)
        if text.startswith("alarm: "):
            shown.set()

    def set_up(first: int) -> None:
        def slow(temporary: Path, files: checkpoint.Files) -> None:
            if int(temporary.stem[-6:]) >= first:
                assert shown.wait(600)
            write(temporary, files)

        monkeypatch.setattr(checkpoint, "write", slow)
        monkeypatch.setattr(watch, "say", say)

    return set_up


@pytest.mark.parametrize("saving", [5, 99], ids=["while step 5 is being saved", "with step 5 saved"])
def test_a_diverging_critic_stops_before_it_is_saved(words, tmp_path, monkeypatch, capsys, slow_disk, saving):
    """The alarm of step 6 names and keeps the checkpoint of step 5, even while that is still being written."""
    growing_from(6, monkeypatch)
    slow_disk(saving)
    command = [*words, f"run={tmp_path}", "iters=12", "log_every=1", "save_every=1", "sample_every=0", "alarms=stop"]
    line = stops(capsys, *command)  # one large line of two is enough to raise the median above twice the usual
    assert "step 6: divergence (" in line and f"{tmp_path}/stage3/checkpoints/step-000005; give" in line
    assert steps(tmp_path / "stage3/checkpoints") == [5]
    assert [p.name for p in (tmp_path / "stage3/checkpoints").iterdir()] == ["step-000005"]
    assert {a["good"] for a in read_metrics(tmp_path / "stage3/alarms.jsonl")} == {5}
    assert [r["step"] for r in read_metrics(tmp_path / "stage3/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    # The bad step was not saved: it is computed again and raises the alarm again.
    assert "step 6: divergence (" in stops(capsys, *command)


def test_warn_reports_an_alarm_once_also_across_a_resume(words, tmp_path, monkeypatch, capsys):
    growing_from(6, monkeypatch)
    command = [*words, f"run={tmp_path}", "log_every=1", "save_every=1", "sample_every=0"]

    def check(self, done):
        if done == 9:
            raise ValueError("stopped by the test")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Distill, "check", check)
        run_train(*command, "iters=12")
    run_train(*command, "iters=12")
    alarms = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm: ")]
    assert len(alarms) == 1 and alarms[0].startswith("alarm: step 6: divergence (")
    [alarm] = read_metrics(tmp_path / "stage3/alarms.jsonl")
    losses = [r["fake_loss"] for r in read_metrics(tmp_path / "stage3/metrics.jsonl")]
    middle = sorted(losses[:3])[1]
    both = (losses[4] * losses[5]) ** 0.5  # the median of two logarithms
    assert alarm["value"] == pytest.approx(both) and alarm["usual"] <= middle * (1 + 1e-12) and alarm["good"] == 5
    assert steps(tmp_path / "stage3/checkpoints") == [5, 12]


@pytest.mark.parametrize("stage, extra", [("3", "alarms=off"), ("0", "alarms=warn")])
def test_where_nothing_is_watched(words, tmp_path, frozen_from, capsys, stage, extra):
    """No alarm with alarms=off, nor from the clips of Stage 0, whose loss itself compares with the data."""
    frozen_from(1)
    words = [*write_inputs(tmp_path / "inputs")[int(stage)], "keep=1", "sample_every=3"]
    run_train(f"stage={stage}", *words, f"run={tmp_path}", extra)
    folder = tmp_path / f"stage{stage}"
    assert "alarm" not in capsys.readouterr().out and not (folder / "alarms.jsonl").exists()
    assert steps(folder / "checkpoints") == [7]


def test_clips_of_the_shipped_teacher_are_as_usual(tmp_path):
    folder = trained_folder("tiny")
    net = load_model(folder)
    preview = Preview(ShapesSource(0), BuiltIn(), 0, torch.device("cpu"))
    looks = preview.write(tmp_path, 1, {"model": net} | preview_plan(read_card(folder), 3.0, net.released), bool)
    assert len(looks) == 4 and drift.in_clips(looks, preview.real(), drift.Limits()) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_distillation_of_the_tiny_model(tmp_path, capsys):
    """Distil the shipped teacher, with all blocks, to a student of 4 steps.

    At the preset's learning rate no alarm is raised. At a far higher one the clips degrade and raise an alarm.
    """
    folder = trained_folder("tiny")
    net = load_model(folder)
    save_model(net, tmp_path / "stage2", **read_card(folder) | {"pruned_path": list(range(net.num_blocks))})
    words = ["stage=3", "model=tiny", "progress=false", "threads=1", "log_every=1", "batch=4", "ratio=2"]
    words += [f"stage2_model={tmp_path}/stage2", "iters=8", "sample_every=4"]
    run_train(*words, f"run={tmp_path}/a")
    assert "alarm" not in capsys.readouterr().out and not (tmp_path / "a/stage3/alarms.jsonl").exists()
    assert "of the clips (" in stops(capsys, *words, f"run={tmp_path}/b", "lr=0.05", "alarms=stop")
