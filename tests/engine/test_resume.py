"""A run that is killed at any point and started again gives bit for bit the result of an uninterrupted run."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forks import Fork
from helpers import assert_same, result, run_train, write_inputs

from fastlightgen.engine import checkpoint
from fastlightgen.engine.loop import Stopped, interruptible, stoppable
from fastlightgen.files import tensors
from fastlightgen.world.source import ShapesSource

RUNS = {
    "teacher with ema": (0, ["ema=0.9", "warmup=3"]),
    "averaged target": (2, ["target=ema", "target_decay=0.9", "alpha=0.7"]),
    "critic copy with ema": (3, ["ema=0.9"]),
    "critic lora": (3, ["fake_mode=lora", "lora_rank=2"]),
    "shared rollouts": (3, ["rollouts=shared", "critic_start=2", "micro_batch=1"]),  # step 3 is inside a cycle
}


class Crash(Exception):
    """An error that no handler in the program catches."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A function kind -> result of an uninterrupted run; each kind is run once."""
    done = {}

    def get(kind: str) -> dict:
        if kind not in done:
            stage, words = RUNS[kind]
            run = tmp_path_factory.mktemp("whole")
            run_train(f"stage={stage}", f"run={run}", *inputs[stage], *words, "keep=1")
            done[kind] = result(run, stage)
        return done[kind]

    return get


def nth_call(n: int, fn, before: bool = True):
    """Wrap fn so that its n-th call crashes, before or after doing its work."""
    calls = 0

    def wrapped(*args, **keys):
        nonlocal calls
        calls += 1
        if calls == n and before:
            raise Crash
        out = fn(*args, **keys)
        if calls == n:
            raise Crash
        return out

    return wrapped


def before_optimizer(patch, files):
    patch.setattr(torch.optim.AdamW, "step", nth_call(5, torch.optim.AdamW.step))


def after_optimizer(patch, files):
    patch.setattr(torch.optim.AdamW, "step", nth_call(6, torch.optim.AdamW.step, before=False))


def inside_saving(patch, files):  # the second checkpoint, with one of its files written
    patch.setattr(checkpoint, "save_file", nth_call(files + 2, checkpoint.save_file))


def before_rename(patch, files):
    patch.setattr(Path, "rename", nth_call(1, Path.rename))


def between_rename_and_pruning(patch, files):  # the rename is followed by flush(folder)
    patch.setattr(checkpoint, "flush", nth_call(2 * (files + 2), checkpoint.flush))


def before_the_result(patch, files):
    patch.setattr(tensors, "save_file", nth_call(1, tensors.save_file))


EVERYWHERE = [before_optimizer, after_optimizer, inside_saving, before_the_result]
CASES = [(kind, place) for kind in RUNS for place in EVERYWHERE]
CASES += [
    (kind, place)
    for kind in ("averaged target", "critic lora")
    for place in (before_rename, between_rename_and_pruning)
]


@pytest.mark.parametrize("kind, place", CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_killed_and_continued(kind, place, inputs, finished, tmp_path, monkeypatch):
    stage, words = RUNS[kind]
    command = [f"stage={stage}", f"run={tmp_path}", *inputs[stage], *words, "keep=1"]
    wanted = finished(kind)
    with monkeypatch.context() as patch:
        place(patch, len(wanted["state"]))
        with pytest.raises(Crash):
            run_train(*command)
    assert not (tmp_path / f"stage{stage}/model").exists()
    steps = checkpoint.steps(tmp_path / f"stage{stage}/checkpoints")
    assert steps == {
        "before_rename": [],
        "between_rename_and_pruning": [3, 6],
        "before_the_result": [7],
    }.get(place.__name__, steps)
    run_train(*command)
    assert_same(result(tmp_path, stage), wanted)
    folder = tmp_path / f"stage{stage}/checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000007"]  # the temporary folder is removed


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_saved_at_every_step_computes_the_same(kind, inputs, finished, tmp_path):
    """save_every and keep do not affect the numbers, nor does a second resume."""
    stage, words = RUNS[kind]
    command = [f"stage={stage}", f"run={tmp_path}", *inputs[stage], *words]
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            patch.setattr(checkpoint, "thin", nth_call(2, checkpoint.thin, before=False))
            with pytest.raises(Crash):
                run_train(*command, "save_every=1", "keep=3")
            patch.undo()
    assert checkpoint.steps(tmp_path / f"stage{stage}/checkpoints") == [2, 3, 4]
    run_train(*command, "save_every=5", "keep=1")
    assert_same(result(tmp_path, stage), finished(kind))


def child(code: str, *words: str) -> Fork:
    """Start a process that runs `code` (a patch) and then the train command with these words."""
    script = f"{code}\nfrom fastlightgen.config import main\nfrom fastlightgen.train import train\nmain(train, 'train')"
    return Fork(["-c", script, *words], os.environ | {"OMP_NUM_THREADS": "1"})


def test_sigkill_while_saving(inputs, finished, tmp_path):
    kind = "averaged target"
    stage, words = RUNS[kind]
    command = [f"stage={stage}", f"run={tmp_path}", *inputs[stage], *words, "keep=1"]
    kill = f"""
import os
from fastlightgen.engine import checkpoint
real, calls = checkpoint.save_file, []
def save_file(tensors, path):
    real(tensors, path)
    calls.append(path)
    if len(calls) == {len(finished(kind)["state"]) + 2}:
        os.kill(os.getpid(), 9)
checkpoint.save_file = save_file"""
    process = child(kill, *command)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    folder = tmp_path / f"stage{stage}/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [".step-000006.tmp", "step-000003"]
    run_train(*command)
    assert_same(result(tmp_path, stage), finished(kind))


SAVED = "{}: saved step 5 of 7; run the same command to continue"


def test_sigint_ends_the_step_saves_and_says_how_to_continue(inputs, finished, tmp_path):
    kind = "critic copy with ema"
    stage, words = RUNS[kind]
    command = [f"stage={stage}", f"run={tmp_path}", *inputs[stage], *words, "keep=1"]
    pause = f"""
import pathlib, time
from fastlightgen.world.source import ShapesSource
real = ShapesSource.batch
def batch(self, step, size, rows=None):
    if step == 4:
        pathlib.Path({str(tmp_path)!r}, "ready").touch()
        while not pathlib.Path({str(tmp_path)!r}, "go").exists():
            time.sleep(0.02)
    return real(self, step, size, rows)
ShapesSource.batch = batch"""
    process = child(pause, *command)
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    _, err = process.communicate()
    assert process.returncode == 130 and err.strip() == SAVED.format("SIGINT")
    assert checkpoint.steps(tmp_path / f"stage{stage}/checkpoints") == [5]
    run_train(*command)
    assert_same(result(tmp_path, stage), finished(kind))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("after_a_save", [False, True])
def test_a_scheduler_stops_it_while_it_loads(inputs, finished, tmp_path, sent, after_a_save):
    """One line, exit code 75; nothing is left of a first start, and a checkpoint serves the next one."""
    kind = "teacher with ema"
    stage, words = RUNS[kind]
    run = tmp_path / "run"
    command = [f"stage={stage}", f"run={run}", *inputs[stage], *words, "keep=1"]
    if after_a_save:
        process = child("from fastlightgen.engine import ema\nreal, calls = ema.Ema.update, []\n"
                        "def update(*words):\n    real(*words)\n    calls.append(1)\n"
                        "    if len(calls) == 5:\n        import os\n        os.kill(os.getpid(), 15)\n"
                        "ema.Ema.update = update", *command)  # fmt: skip
        process.communicate()
        assert process.returncode == 75
    process = child(f"import os\nfrom fastlightgen.stages.build import Builder\nreal = Builder.load\n"
                    f"def load(*words, **more):\n    os.kill(os.getpid(), {int(sent)})\n"
                    f"    return real(*words, **more)\nBuilder.load = load", *command)  # fmt: skip
    _, err = process.communicate()
    said = f"{sent.name}: stopped outside the steps; run the same command (without overwrite=true) to continue from the"
    assert process.returncode == 75 and err.strip() == f"{said} last checkpoint, if there is one"
    assert run.exists() == after_a_save
    run_train(*command)
    assert_same(result(run, stage), finished(kind))


def test_a_second_signal_kills():
    """Also where Python's own handlers would wait, and the handlers before are back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stoppable():
        with interruptible() as seen:
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == ["SIGTERM"] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_does_the_same(inputs, finished, tmp_path, monkeypatch, capsys):
    """Also with overwrite=true, which the command that continues leaves out."""
    kind = "teacher with ema"
    stage, words = RUNS[kind]
    command = [f"stage={stage}", f"run={tmp_path}", *inputs[stage], *words, "keep=1"]
    old = signal.getsignal(signal.SIGTERM)
    real = ShapesSource.batch

    def batch(self, step, size, rows=None):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step, size, rows)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ShapesSource, "batch", batch)
        run_train(*command, "overwrite=true")
    wanted = SAVED.format("SIGTERM").replace("the same command", "the same command without overwrite=true")
    assert stop.value.code == 75 and capsys.readouterr().err.strip() == wanted
    assert signal.getsignal(signal.SIGTERM) is old
    run_train(*command)
    assert_same(result(tmp_path, stage), finished(kind))
