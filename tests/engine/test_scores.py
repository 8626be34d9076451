"""Stage I stops at some walk and goes on: the ranking is that of an undisturbed run, and nothing is measured twice."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import run_train, small_wan, write_shapes
from safetensors.torch import load_file, save_file

from fastlightgen.data.cache import META
from fastlightgen.engine.scores import Scores
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import save_model

# 3 clips in batches of 2, at 2 times: 4 walks for each group of block sets; a group is one set (little memory).
SWEEP = ["stage=1", "clips=3", "timesteps=2", "batch=2", "memory=1e-9", "shift=3", "progress=false", "threads=1"]
SAMPLES, SKIPS, WALKS = 6, 5, 4  # 4 skips and the full network


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = save_model(small_wan(seed=3), tmp_path_factory.mktemp("model"))
    return [*SWEEP, f"model={folder}"]


def counted(monkeypatch, at: int = 0, strike=lambda: None) -> list[int]:
    """Count the walks of any network in a list; call `strike` in walk number `at`."""
    walks, real = [], VideoDiT.walk

    def walk(self, x_t, t, streams):
        walks.append(len(streams))
        if len(walks) == at:
            strike()
        return real(self, x_t, t, streams)

    monkeypatch.setattr(VideoDiT, "walk", walk)
    return walks


def stopped(capsys, *words: str) -> tuple[int, str]:
    """Run a command that must end early; return its exit code and its last line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_train(*words)
    return stop.value.code, capsys.readouterr().err.strip()


@pytest.mark.parametrize("extra", [[], ["score=output_mse"], ["search=iterative", "ratio=0.5"], ["search=exhaustive"]])
def test_a_signal_at_any_walk_costs_nothing(words, extra, tmp_path, monkeypatch, capsys):
    words = [*words, *extra]
    with monkeypatch.context() as patch:
        all_walks = counted(patch)
        run_train(*words, f"run={tmp_path}/whole")
    wanted = (tmp_path / "whole/stage1/importance.json").read_bytes()
    total = len(all_walks)
    for at in (1, 7, WALKS * SKIPS, total - 1):
        command = [*words, f"run={tmp_path}/{at}"]
        with monkeypatch.context() as patch:
            counted(patch, at, lambda: os.kill(os.getpid(), signal.SIGINT))
            code, line = stopped(capsys, *command)
        assert code == 130 and line.endswith("; run the same command to continue"), line
        if at <= WALKS * SKIPS:  # the batches of 2, 2, 1 and 1 clips follow each other, each with all 5 block sets
            clips = [2, 2, 1, 1]
            done = sum(clips[walk // SKIPS] for walk in range(at))
            assert line.startswith(f"SIGINT: saved {done} of {SAMPLES * SKIPS} scores (stage 1: skip each block)")
        folder = tmp_path / f"{at}/stage1"
        assert [p.name for p in folder.iterdir()] == ["scores.safetensors"]
        with monkeypatch.context() as patch:
            walks = counted(patch)
            run_train(*command)
        assert len(walks) == total - at
        assert (folder / "importance.json").read_bytes() == wanted
        assert sorted(p.name for p in folder.iterdir()) == ["importance.json", "importance.png"]
        if at == 7:
            assert f"stage 1: skip each block: continues with {done} of 30 scores" in capsys.readouterr().out
    assert len(all_walks) > WALKS * SKIPS  # further sweeps follow


def test_scores_of_other_memory_go_on(words, tmp_path, monkeypatch, capsys):
    """Groups of another size continue with the block sets that are left, to the same bits."""
    run_train(*words, f"run={tmp_path}/whole")
    with monkeypatch.context() as patch:
        counted(patch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        code, line = stopped(capsys, *words, f"run={tmp_path}/a")
    assert code == 75 and line.startswith("SIGTERM: saved")
    with monkeypatch.context() as patch:
        walks = counted(patch)
        run_train(*words, f"run={tmp_path}/a", "memory=4")
    assert walks == [3, 5, 5, 1, 1, 1, 1]  # of the second batch 3 block sets are left; then all 5; then the last sweep
    files = [tmp_path / f"{name}/stage1/importance.json" for name in ("whole", "a")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_does_not_belong_together_is_refused(words, tmp_path, monkeypatch, capsys):
    command = [*words, f"run={tmp_path}"]
    with monkeypatch.context() as patch:
        counted(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped(capsys, *command)
    file = tmp_path / "stage1/scores.safetensors"
    before = file.read_bytes()
    code, line = stopped(capsys, *command, "timesteps=3")
    assert code == 2 and "made with another configuration (timesteps: 2 -> 3)" in line and file.read_bytes() == before
    file.write_bytes(before[:-5])
    code, line = stopped(capsys, *command)
    assert code == 2 and f"{file}: cannot be read" in line and "delete it to start Stage I anew" in line
    file.unlink()
    run_train(*command)
    with monkeypatch.context() as patch:  # a second start with overwrite=true would delete the scores
        counted(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        _, line = stopped(capsys, *command, "overwrite=true")
    assert line.endswith("run the same command without overwrite=true to continue")


def test_scores_of_a_cache_that_has_changed_are_refused(words, tmp_path, monkeypatch, capsys):
    write_shapes(tmp_path / "cache", 12)
    command = [*words, f"run={tmp_path}/run", f"data={tmp_path}/cache"]
    with monkeypatch.context() as patch:
        counted(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped(capsys, *command)
    shutil.rmtree(tmp_path / "cache")
    write_shapes(tmp_path / "cache", 18)
    code, line = stopped(capsys, *command)
    assert code == 2 and "holds scores of other clips (data_hash " in line


def test_a_crash_between_two_walks_keeps_what_was_saved(tmp_path):
    """The file holds every score that was noted, in float32, and nothing where none was."""
    place = SimpleNamespace(scores=tmp_path / "scores.safetensors")
    with pytest.raises(RuntimeError, match="crash"), Scores(place, "d", [], False, False).sweep(2, 3, "x") as sweep:
        sweep.table[0, :2] = torch.tensor([0.1, 0.2])
        sweep.note()
        sweep.table[1, 1] = 7.0
        raise RuntimeError("crash")
    nan = torch.nan
    saved = load_file(place.scores)["sweep-0000"]
    assert torch.equal(saved.nan_to_num(-1), torch.tensor([[0.1, 0.2, nan], [nan, nan, nan]]).nan_to_num(-1))
    with Scores(place, "d", [], False, False).sweep(2, 3, "x") as sweep:
        assert torch.equal(sweep.table.nan_to_num(-1), saved.nan_to_num(-1))
    save_file({"sweep-0000": torch.zeros(3, 3)}, place.scores, {META: '{"data": "d"}'})
    scores = Scores(place, "d", [], False, False)
    with pytest.raises(ValueError, match=r"its table sweep-0000 is \(3, 3\)"), scores.sweep(2, 3, "x"):
        pass
