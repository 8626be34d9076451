"""Checkpoints are written in the background, one at a time, and contain the state of their own step."""

import errno
import fcntl
import os
import threading

import pytest
import torch
from helpers import assert_same, result, run_train, write_inputs
from safetensors.torch import load_file

from fastlightgen.engine import checkpoint, direct
from fastlightgen.parallel import ranks
from fastlightgen.stages.teacher import Teacher


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_steps_go_on_while_a_checkpoint_is_written(inputs, tmp_path, monkeypatch):
    """Writing the checkpoint of step 3 takes until step 5. All checkpoints equal those of a run with a fast disk."""
    command = ["stage=0", f"run={tmp_path}", *inputs[0], "ema=0.9", "keep=3"]
    reached, seen = threading.Event(), []
    write, check = checkpoint.write, Teacher.check

    def slow(*args):
        assert seen or reached.wait(600)
        write(*args)

    def note(self, step):
        if step == 5:
            seen.append(checkpoint.steps(tmp_path / "stage0/checkpoints"))
            reached.set()
        return check(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", slow)
        patch.setattr(Teacher, "check", note)
        run_train(*command)
    assert seen == [[]]  # at step 5 the checkpoint of step 3 was still being written
    assert checkpoint.steps(tmp_path / "stage0/checkpoints") == [3, 6, 7]
    run_train("stage=0", f"run={tmp_path}/whole", *inputs[0], "ema=0.9", "keep=3")
    for step in (3, 6, 7):
        files = [checkpoint.path(run / "stage0/checkpoints", step) for run in (tmp_path, tmp_path / "whole")]
        one, two = (checkpoint.load(sorted(folder.glob("*.safetensors"))) for folder in files)
        assert_same(one, two)
    assert_same(result(tmp_path, 0), result(tmp_path / "whole", 0))


def test_one_at_a_time(inputs, tmp_path, monkeypatch):
    """With a save at every step, each save waits for the previous one, and the end of the run for the last."""
    inside, overlaps, write = [], [], checkpoint.write

    def counted(*args):
        inside.append(1)
        overlaps.append(len(inside))
        write(*args)
        inside.pop()

    monkeypatch.setattr(checkpoint, "write", counted)
    run_train("stage=0", f"run={tmp_path}", *inputs[0], "save_every=1", "keep=7")
    assert overlaps == [1] * 7 and checkpoint.steps(tmp_path / "stage0/checkpoints") == [1, 2, 3, 4, 5, 6, 7]


def test_an_error_of_the_run_still_completes_the_current_checkpoint(inputs, tmp_path, monkeypatch, capsys):
    failed, write = threading.Event(), checkpoint.write

    def slow(*args):
        assert failed.wait(600)
        write(*args)

    def check(self, step):
        if step == 4:
            failed.set()
            raise ValueError("stopped by the test")

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(Teacher, "check", check)
    with pytest.raises(SystemExit):
        run_train("stage=0", f"run={tmp_path}", *inputs[0])
    assert "stopped by the test" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "stage0/checkpoints").iterdir()] == ["step-000003"]


def test_a_host_copy_does_not_change():
    x = torch.arange(6.0).view(2, 3).T.requires_grad_()  # not contiguous; safetensors stores contiguous tensors only
    copy = checkpoint.host_copy(x)
    with torch.no_grad():
        x.zero_()
    assert copy.is_contiguous() and torch.equal(copy, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


@pytest.mark.parametrize("dtype", [*direct.NAMES], ids=str)
def test_safetensors_reads_the_files(tmp_path, dtype):
    tensors = {"a": torch.arange(-3, 4).to(dtype), "step": torch.tensor(2.0), "none": torch.zeros(0, 3, dtype=dtype)}
    tensors["b"] = torch.randn(2, 3, 5).to(dtype)
    checkpoint.save_file(tensors, tmp_path / "x.safetensors")
    assert_same(load_file(tmp_path / "x.safetensors"), tensors)
    checkpoint.save_file({}, tmp_path / "empty")
    assert load_file(tmp_path / "empty") == {}


@pytest.mark.parametrize("refused", ["", "open", "write"])
@pytest.mark.parametrize("size", [8192, 8191, 30000])
def test_files_longer_than_one_chunk(tmp_path, monkeypatch, size, refused):
    """Chunks of two blocks; each os.write takes one block only. Some file systems refuse direct I/O (`refused`)."""
    monkeypatch.setattr(direct, "CHUNK", 2 * direct.BLOCK)
    real, flags = {"open": os.open, "write": os.write}, []

    def open_(file, how, *mode):
        flags.append(bool(how & direct.DIRECT))
        if refused == "open" and flags[-1]:
            raise OSError(errno.EINVAL, "no direct I/O here")
        return real["open"](file, how, *mode)

    def write(handle, data):
        now = bool(fcntl.fcntl(handle, fcntl.F_GETFL) & direct.DIRECT)
        if refused == "write" and now:
            raise OSError(errno.EINVAL, "no direct I/O now")
        return real["write"](handle, data[: direct.BLOCK])

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    tensors = {"a": torch.arange(size).to(torch.uint8).view(torch.bfloat16) if size % 2 == 0 else torch.arange(size)}
    tensors["b"] = torch.tensor(3.0)
    direct.save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.undo()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k].view(torch.uint8), v.view(torch.uint8)) for k, v in tensors.items() if v.dim())
    assert flags == ([True, False] if refused == "open" else [True])


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def write(handle, data):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="no space left"):
        direct.save_file({"a": torch.zeros(4)}, tmp_path / "x")


@pytest.fixture
def two_ranks(monkeypatch):
    """This process is rank 0 of two; the test plays the other one."""
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "from_rank", lambda owner, value: value if owner == 0 else ["the disk is full", False])


def saved(rank: int) -> dict:
    return {checkpoint.rank_file(rank): {f"w{rank}": torch.ones(2)}}


def test_rank_0_renames_the_folder_after_all_ranks_have_written(tmp_path, two_ranks):
    saving = checkpoint.save(tmp_path, 4, saved(0), {"engine": "deepspeed", "count": {}}, keep=1)
    saving.thread.join(0.3)
    assert saving.status() == checkpoint.BUSY and not saving.is_complete([checkpoint.BUSY, checkpoint.BUSY])
    checkpoint.write(tmp_path / ".step-000004.tmp", saved(1))
    saving.thread.join(600)
    assert saving.status() == 0 and saving.is_complete([0, 0]) and not saving.is_complete([0, checkpoint.BUSY])
    step, meta, files = checkpoint.latest(tmp_path, "deepspeed")
    assert step == 4 and meta["files"] == [checkpoint.rank_file(r) for r in range(2)]
    assert {k for tensors in checkpoint.load(files).values() for k in tensors} == {"w0", "w1"}


def test_a_rank_that_cannot_write_stops_all(tmp_path, two_ranks):
    saving = checkpoint.save(tmp_path, 4, saved(0), {}, keep=1)
    with pytest.raises(
        ValueError, match="step-000004: the checkpoint could not be saved .the disk is full.; there is none"
    ):
        saving.is_complete([checkpoint.BUSY, checkpoint.FAILED])
    assert list(tmp_path.iterdir()) == [] and not saving.thread.is_alive()


def test_a_run_that_ends_does_not_wait_long_for_a_rank_that_has_gone(tmp_path, two_ranks, monkeypatch):
    monkeypatch.setattr(checkpoint, "PEER_TIMEOUT", 0.2)
    with pytest.raises(RuntimeError, match="gone"), checkpoint.Background() as saves:
        saves.saving = checkpoint.save(tmp_path, 4, saved(0), {}, keep=1)
        raise RuntimeError("gone")
    saves.saving.thread.join(600)
    assert not saves.saving.thread.is_alive() and checkpoint.steps(tmp_path) == []
