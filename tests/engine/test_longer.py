"""`iters` is raised after a stage has ended or stopped: it goes on, to the bits of a run that was that long at once."""

import math
import shutil

import pytest
import torch
import yaml
from helpers import assert_same, result, run_train, write_inputs

from fastlightgen.engine import checkpoint
from fastlightgen.engine.log import read_metrics
from fastlightgen.metrics import drift
from fastlightgen.models.folder import files as model_files
from fastlightgen.stages.teacher import Teacher

RUNS = {
    "teacher with ema": (0, ["ema=0.9", "lr_schedule=constant"]),
    "averaged target": (2, ["target=ema", "target_decay=0.9", "alpha=0.7"]),
    "critic copy with ema": (3, ["ema=0.9"]),
    "shared rollouts": (3, ["rollouts=shared", "critic_start=2", "micro_batch=1"]),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The command line of each stage, which logs every step and saves every third."""
    made = write_inputs(tmp_path_factory.mktemp("inputs"))
    return {stage: [*words, "log_every=1", "sample_every=0"] for stage, words in made.items()}


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with exit code 2 and one line; return the line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_train(*words)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        return err

    return run


@pytest.mark.parametrize("kind", RUNS)
def test_a_finished_stage_goes_on(kind, inputs, tmp_path, capsys):
    stage, extra = RUNS[kind]
    words = [f"stage={stage}", *inputs[stage], *extra]
    run_train(*words, f"run={tmp_path}/whole", "iters=7")
    run_train(*words, f"run={tmp_path}/parts", "iters=4")
    short = result(tmp_path / "parts", stage)
    capsys.readouterr()
    run_train(*words, f"run={tmp_path}/parts", "iters=7")
    folder = tmp_path / f"parts/stage{stage}"
    out = capsys.readouterr().out
    assert f"{folder}: iters was 4, is now 7: goes on from step 4; the result of 4 steps is now {folder}/model-" in out
    assert f"stage {stage}: continues at step 4 of 7" in out and "warning" not in out
    assert_same(result(tmp_path / "parts", stage), result(tmp_path / "whole", stage))
    assert_same(model_files.read_tensors([folder / "model-000004/diffusion_pytorch_model.safetensors"]), short["model"])
    assert yaml.safe_load((tmp_path / "parts/config.yaml").read_text())[f"stage{stage}"]["iters"] == 7
    run_train(*words, f"run={tmp_path}/parts", "iters=7")
    assert "nothing to do" in capsys.readouterr().out


def test_an_interrupted_stage_takes_another_length(inputs, tmp_path, monkeypatch, fails):
    """Stopped at step 5 with a checkpoint of step 3: it goes on to 6 in place of 7, and cannot go back to 2."""
    words = ["stage=0", *inputs[0], "lr_schedule=constant"]

    def check(self, done):
        if done == 5:
            raise ValueError("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "check", check)
        fails(*words, f"run={tmp_path}/parts", "iters=7")
    line = fails(*words, f"run={tmp_path}/parts", "iters=2")
    assert f"iters=2: {tmp_path}/parts/stage0 has reached step 3 already; give iters=3 or more" in line
    run_train(*words, f"run={tmp_path}/parts", "iters=6")
    run_train(*words, f"run={tmp_path}/whole", "iters=6")
    assert_same(result(tmp_path / "parts", 0), result(tmp_path / "whole", 0))
    assert not list((tmp_path / "parts/stage0").glob("model-*"))


def test_a_longer_run_that_is_killed_is_not_taken_for_a_finished_one(inputs, tmp_path, monkeypatch):
    words = ["stage=0", f"run={tmp_path}/parts", *inputs[0], "lr_schedule=constant"]
    run_train(*words, "iters=4")

    def crash(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Teacher, "loss", crash)
        run_train(*words, "iters=7")
    run_train(*words, "iters=7")
    run_train(*words, f"run={tmp_path}/whole", "iters=7")
    assert_same(result(tmp_path / "parts", 0), result(tmp_path / "whole", 0))


def test_a_cosine_stretches_and_says_so(inputs, tmp_path, capsys):
    """After 4 of 4 steps the rate was about to be 0; over 7 steps it goes on where a cosine of 7 steps is."""
    words = ["stage=0", f"run={tmp_path}", *inputs[0], "lr_schedule=cosine", "warmup=0", "lr=1e-3"]
    run_train(*words, "iters=4")
    capsys.readouterr()
    run_train(*words, "iters=7")
    rate = 0.5 + 0.5 * math.cos(math.pi * 4 / 7)
    said = f"the fall to 0 now ends at step 7, not 4, so the learning rate goes on at {rate:.2f} of lr"
    assert said in capsys.readouterr().out
    rates = [line["lr"] for line in read_metrics(tmp_path / "stage0/metrics.jsonl")]
    wanted = [1e-3 * (0.5 + 0.5 * math.cos(math.pi * step / total)) for step, total in enumerate([4] * 4 + [7] * 3)]
    assert rates == pytest.approx(wanted)


def test_what_is_missing_is_named(inputs, tmp_path, fails):
    words = ["stage=0", f"run={tmp_path}", *inputs[0], "lr_schedule=constant"]
    run_train(*words, "iters=4")
    assert "(lr: 0.001 -> 0.5)" in fails(*words, "iters=7", "lr=0.5")  # anything else is another configuration
    shutil.rmtree(tmp_path / "stage0/checkpoints")
    line = fails(*words, "iters=7")
    assert f"was finished with iters=4, and {tmp_path}/stage0/checkpoints holds no checkpoint to go on from" in line
    assert (tmp_path / "stage0/model/config.json").is_file()


def test_the_best_student_so_far_stays_the_best(inputs, tmp_path, monkeypatch):
    """choose=best: the best of the first 4 steps is still the result after 7, if nothing better came."""
    from fastlightgen.engine.choice import Choice

    scores = {2: 0.1, 4: 0.4, 6: 0.3, 7: 0.2}
    monkeypatch.setattr(Choice, "score", lambda self, stage: scores[self.looked])
    words = ["stage=3", f"run={tmp_path}", *inputs[3], "choose=best", "choose_every=2", "ratio=1", "ema=0"]
    run_train(*words, "iters=4")
    first = result(tmp_path, 3)
    run_train(*words, "iters=7")
    second = result(tmp_path, 3)
    assert_same(first["model"], second["model"])
    assert second["card"]["chosen"] == {"step": 2, "updates": 2, "score": 0.1}
    assert not torch.equal(*(r["state"]["student.safetensors"]["proj_out.weight"] for r in (first, second)))


def test_keep_counts_the_checkpoints_that_are_left(inputs, tmp_path, monkeypatch):
    """While Stage III runs, one more checkpoint waits for an alarm of the next clips; at the end `keep` holds."""
    left, real = [], checkpoint.thin

    def thin(folder, *how):
        real(folder, *how)
        left.append(checkpoint.steps(folder))

    monkeypatch.setattr(checkpoint, "thin", thin)
    monkeypatch.setattr(drift, "in_clips", lambda *_: [])  # no alarm
    run_train("stage=3", f"run={tmp_path}", *inputs[3], "sample_every=3", "save_every=1", "iters=6", "keep=2")
    assert left == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5], [3, 5, 6], [5, 6]]
