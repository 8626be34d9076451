"""Faults of a run folder: one error line names the file and the remedy, and no saved state is lost."""

import errno
import fcntl
import json
import shutil

import pytest
import torch
from helpers import assert_same, result, run_train, write_inputs, write_ranking

from fastlightgen.engine import checkpoint
from fastlightgen.engine.log import Lines, read_metrics
from fastlightgen.models.folder.weights import WEIGHTS
from fastlightgen.stages.teacher import Teacher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with exit code 2 and one line on stderr; return the line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_train(*words)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stop_after(step: int, monkeypatch):
    """End every later run with an error after `step`, as a full disk or a crash would."""

    def check(self, done):
        if done > step:
            raise ValueError("stopped by the test")

    monkeypatch.setattr(Teacher, "check", check)


def test_another_configuration_is_refused(inputs, tmp_path, fails):
    command = ["stage=0", f"run={tmp_path}", *inputs[0]]
    run_train(*command)
    before = contents(tmp_path)
    line = fails(*command, "lr=0.5", "seed=3", "keep=1")
    assert "was made with another configuration" in line and "lr: 0.001 -> 0.5" in line and "seed: 0 -> 3" in line
    assert "keep" not in line and "overwrite=true" in line and f"{tmp_path}/stage0" in line
    assert contents(tmp_path) == before


def test_a_finished_stage_has_nothing_to_do(inputs, tmp_path, capsys):
    command = ["stage=0", f"run={tmp_path}", *inputs[0]]
    run_train(*command)
    before = contents(tmp_path)
    capsys.readouterr()
    run_train(*command, "save_every=1", "log_every=1")  # keys that do not affect the numbers may differ
    assert "nothing to do (overwrite=true starts anew)" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_overwrite_starts_anew_and_touches_no_other_stage(inputs, tmp_path):
    command = ["stage=0", f"run={tmp_path}", *inputs[0]]
    run_train(*command)
    first = result(tmp_path, 0)
    (tmp_path / "stage0/stranger").touch()
    kept = write_ranking(tmp_path / "stage1/importance.json").read_bytes()
    run_train(*command, "overwrite=true", "lr=0.002")
    again = result(tmp_path, 0)
    assert not torch.equal(again["model"]["proj_out.weight"], first["model"]["proj_out.weight"])
    assert not (tmp_path / "stage0/stranger").exists()
    assert (tmp_path / "stage1/importance.json").read_bytes() == kept
    run_train(*command, "overwrite=true")
    assert_same(result(tmp_path, 0), first)


def test_a_folder_in_use_is_left_alone(inputs, tmp_path, fails):
    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = fails("stage=0", f"run={tmp_path}", *inputs[0])
        assert f"run={tmp_path}: another process is using this folder" in line
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    run_train("stage=0", f"run={tmp_path}", *inputs[0], "iters=1")


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty state", "no state", "changed state"])
def test_a_damaged_checkpoint_is_put_aside(inputs, tmp_path, fails, monkeypatch, capsys, damage):
    command = ["stage=0", f"run={tmp_path}", *inputs[0]]
    with monkeypatch.context() as patch:
        stop_after(6, patch)
        fails(*command)
    latest = tmp_path / "stage0/checkpoints/step-000006"
    file = latest / ("state.json" if "state" in damage else "teacher-optimizer.safetensors")
    whole = file.read_bytes()
    if damage in ("missing", "no state"):
        file.unlink()
    elif damage == "changed state":  # another number of updates: the learning rate would be another
        file.write_text(whole.decode().replace('"teacher": 6', '"teacher": 5'))
        assert file.read_bytes() != whole
    elif damage == "flipped":  # one bit of one number
        file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    else:
        file.write_bytes(whole[: 0 if damage == "empty state" else len(whole) // 2])
    before = contents(tmp_path / "stage0/checkpoints")
    line = fails(*command, "damaged=refuse")
    assert str(latest) in line and "damaged or incomplete" in line
    assert "delete it to continue from step-000003" in line
    assert contents(tmp_path / "stage0/checkpoints") == before
    capsys.readouterr()
    run_train(*command)
    said = capsys.readouterr().out
    assert f"warning: {latest}: damaged or incomplete" in said
    assert "it is now damaged-step-000006; continues from step-000003" in said
    assert "continues at step 3 of" in said and latest.with_name("damaged-step-000006").is_dir()
    run_train("stage=0", f"run={tmp_path}/whole", *inputs[0])
    assert_same(result(tmp_path, 0), result(tmp_path / "whole", 0))


def test_a_damaged_result_is_made_again_as_the_error_says(inputs, tmp_path, fails):
    """One bit of the run's own Stage II is flipped: Stage III names a remedy, which gives the same file again."""
    second, folder = ["stage=2", f"run={tmp_path}", *inputs[2]], tmp_path / "stage2/model"
    run_train(*second)
    file = folder / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    third = ["stage=3", f"run={tmp_path}", *(w for w in inputs[3] if not w.startswith("stage2_model="))]
    line = fails(*third)
    assert "is damaged (its checksum is wrong)" in line and str(file) in line
    remedy = f"delete {folder} and type the command of stage=2 again, which makes it from the last checkpoint"
    assert f"; {remedy}, or delete checksums.json if you" in line
    assert f"{folder}: is damaged (diffusion_pytorch_model.safetensors: " in (again := fails(*second))
    assert again.endswith(" is damaged (its checksum is wrong)); delete it, and the same command makes it again\n")
    shutil.rmtree(folder)
    run_train(*second)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "not found; run stage=1 with the same run= first"),
        ("{", "wanted a ranking"),
        (b"\xff\xfe\x00", "wanted a ranking"),
        ("[1, 2]", "wanted a ranking"),
        ('{"units": [1, 2, 3, 4], "kept": ["a"], "pruned": [0]}', "wanted a ranking"),
        ('{"units": [1, 2, 3, 4], "kept": [0], "pruned": [1, 2]}', "the model has 4"),
        ('{"units": [1, 2, 3, 4], "kept": [], "pruned": [0, 1, 2, 3]}', "wanted a ranking"),
        (5, "ranks 5 blocks, but the model has 4; run stage=1 for this model"),
    ],
)
def test_a_ranking_that_does_not_fit(inputs, tmp_path, fails, text, said):
    path = tmp_path / "importance.json"
    if isinstance(text, int):
        write_ranking(path, blocks=text)
    elif text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = fails("stage=2", f"run={tmp_path}/r", *inputs[2], f"importance={path}")
    assert said in line and str(path) in line


def test_a_stage_that_failed_before_it_began_can_be_run_with_other_settings(inputs, tmp_path, fails):
    """Stage 2 without a ranking fails before it computes anything. The folder must then accept other settings."""
    words = ["stage=2", f"run={tmp_path}", *inputs[2], "iters=1"]
    words = [w for w in words if not w.startswith("importance=")] + [f"importance={tmp_path}/stage1/importance.json"]
    assert "run stage=1 with the same run= first" in fails(*words)
    write_ranking(tmp_path / "stage1/importance.json")
    run_train(*words, "lr=0.01")
    write_ranking(tmp_path / "stage1/importance.json", pruned=[0, 3])  # now the result depends on its ranking
    assert "another configuration (ranking" in fails(*words, "lr=0.01")


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_before_the_optimizer(inputs, tmp_path, fails, monkeypatch, where):
    command = ["stage=0", f"run={tmp_path}", *inputs[0]]
    real, steps = Teacher.loss, []

    def loss(self, step):
        out, record = real(self, step)
        if step == 4:
            bad = out * float("nan") if where == "loss" else out
            if where != "loss":  # finite forward, infinite backward
                bad.register_hook(lambda g: g * float("inf"))
            return bad, record
        return out, record

    def optimizer_step(self, *args, **keys):
        steps.append(1)
        return real_step(self, *args, **keys)

    real_step = torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "loss", loss)
        patch.setattr(torch.optim.AdamW, "step", optimizer_step)
        line = fails(*command)
    assert f"step 5, teacher: {where} is " in line and "the last checkpoint is intact" in line
    assert len(steps) == 4  # steps 0 to 3
    assert checkpoint.steps(tmp_path / "stage0/checkpoints") == [3]
    run_train(*command)
    run_train("stage=0", f"run={tmp_path}/whole", *inputs[0])
    assert_same(result(tmp_path, 0), result(tmp_path / "whole", 0))


def test_a_full_disk_while_saving(inputs, tmp_path, fails, monkeypatch):
    command = ["stage=0", f"run={tmp_path}", *inputs[0]]
    real, calls = checkpoint.save_file, []

    def save_file(tensors, path):
        calls.append(path)
        if len(calls) > 3:  # two files per checkpoint: the disk fills up within the second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        line = fails(*command)
    assert "step-000006: the checkpoint could not be saved" in line and "No space left on device" in line
    assert f"the last one is {tmp_path}/stage0/checkpoints/step-000003; make room" in line
    assert [p.name for p in (tmp_path / "stage0/checkpoints").iterdir()] == ["step-000003"]
    run_train(*command)
    run_train("stage=0", f"run={tmp_path}/whole", *inputs[0])
    assert_same(result(tmp_path, 0), result(tmp_path / "whole", 0))


def test_a_full_disk_at_the_first_checkpoint(inputs, tmp_path, fails, monkeypatch):
    def save_file(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert "there is none yet; make room" in fails("stage=0", f"run={tmp_path}", *inputs[0])


def test_checkpoints_flush_before_they_appear(tmp_path, monkeypatch):
    """All files are flushed before the folder is renamed; the rename is flushed before old checkpoints are removed."""
    events, flush = [], checkpoint.flush

    def spy(target):
        events.append((target.name, sorted(x.name for x in tmp_path.iterdir())))
        flush(target)

    monkeypatch.setattr(checkpoint, "flush", spy)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"net": {"w": torch.ones(2)}}, {"count": {}}, keep=1).wait()
    assert [n for n, _ in events[3:5]] == ["net.part", "state.json"]
    assert events[3][1] == [".step-000002.tmp", "step-000001"]
    assert events[5] == (tmp_path.name, ["step-000001", "step-000002"])
    assert checkpoint.steps(tmp_path) == [2]


def test_metrics_drop_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": s / 2}) for s in (1, 3, 5)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    metrics = Lines(path, 3)
    metrics.write({"step": 5, "loss": 9.0})
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 3, "loss": 1.5}, {"step": 5, "loss": 9.0}]


def test_damaged_config_yaml_is_named(inputs, tmp_path, fails):
    run_train("stage=0", f"run={tmp_path}", *inputs[0], "iters=1")
    (tmp_path / "config.yaml").write_text("a: [1")
    assert f"{tmp_path}/config.yaml: is not valid YAML" in fails("stage=0", f"run={tmp_path}", *inputs[0], "iters=1")


def test_a_damaged_line_of_a_log_costs_that_line_alone(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\x00ep": \n{"step": 3}\n{"step": 9}\n')
    Lines(path, 3).write({"step": 4})
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4]
    assert "metrics.jsonl: a line is damaged and left out" in capsys.readouterr().out
