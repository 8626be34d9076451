"""Faults on two real ranks: all ranks end, one error line names the cause, saved state stays intact."""

import importlib.util
import signal
from pathlib import Path

import pytest
import torch
from helpers import write_inputs
from launch import finish, launch, ranks_of, wait_for
from safetensors.torch import load_file

from fastlightgen.engine.checkpoint import steps
from fastlightgen.engine.log import read_metrics
from fastlightgen.parallel import ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

# The train command, with a patch that disturbs a rank.
CODE = """
import os, sys, time
from pathlib import Path
from fastlightgen.config import main
from fastlightgen.train import train
from fastlightgen.stages import prune
from fastlightgen.stages.prune import Prune
RANK = int(os.environ["RANK"])
{patch}
main(train, "train")
"""
SLOW = """
check = Prune.check
def slow(self, step):
    Path(os.environ["FLG_TEST"], "ready").touch()
    while not Path(os.environ["FLG_TEST"], "go").exists():
        time.sleep(0.02)
    return check(self, step)
Prune.check = slow
"""
OTHER_MASKS = """
draw_keep = prune.draw_keep
def other(pruned, blocks, p, full, gen):
    keep = draw_keep(pruned, blocks, p, full, gen)
    return [0, 3] if RANK == 1 and len(keep) > 2 else [0, 1, 3] if RANK == 1 else keep
prune.draw_keep = other
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    given = write_inputs(tmp_path_factory.mktemp("inputs"))[2]
    return ["stage=2", "engine=deepspeed", *(w for w in given if not w.startswith("iters"))]


def start(tmp_path: Path, patch: str, *words: str):
    """Start two ranks of the patched command. With SLOW they wait at the end of a step for the file `go`."""
    (tmp_path / "train.py").write_text(CODE.format(patch=patch))
    process = launch(2, str(tmp_path / "train.py"), *words, module=False, FLG_TEST=str(tmp_path))
    if patch == SLOW:
        wait_for(tmp_path / "ready", process)
    return process


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_batch_that_cannot_be_divided():
    assert ranks.accumulation(64, 2, 8) == 4 and ranks.accumulation(16, 0, 16) == 1 and ranks.accumulation(6, 0, 2) == 1
    with pytest.raises(
        ValueError, match="batch=3: is not a multiple of 2, which is 2 ranks with 1 clips each; use batch=4"
    ):
        ranks.accumulation(3, 0, 2)
    with pytest.raises(ValueError, match="batch=16: is not a multiple of 12, which is 4 ranks with 3 clips each"):
        ranks.accumulation(16, 3, 4)


def test_the_odd_rank_is_found():
    assert (
        ranks.differing([5, 5, 5]) == []
        and ranks.differing([5, 7, 5]) == [1]
        and ranks.differing([5, 5, 7, 8]) == [2, 3]
    )
    assert ranks.differing([1, 2]) == [1]  # in a tie rank 0's number counts


def test_a_rank_with_other_masks_is_named(words, tmp_path):
    """Without the check it would wait for ever in a gather that the other rank never starts."""
    process = start(tmp_path, OTHER_MASKS, *words, f"run={tmp_path}/run", "iters=50", "drop=independent")
    _, err = finish(process)
    assert process.returncode != 0
    (line,) = errors(err)
    assert "the blocks of a walk differs on rank 1 of 2" in line and "start all ranks with the same" in line


def test_a_scheduler_that_wants_the_node_back(words, tmp_path):
    """SIGUSR1 to one rank: both save and end. A single rank then continues, with the losses of an undisturbed run."""
    command = [*words, f"run={tmp_path}/run", "log_every=1"]
    process = start(tmp_path, SLOW, *command, "iters=6", "sample_every=0")
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    (tmp_path / "go").touch()
    out, err = finish(process)
    saved = steps(tmp_path / "run/stage2/checkpoints")
    assert len(saved) == 1 and 1 <= saved[0] < 6, err
    assert f"SIGUSR1: saved step {saved[0]} of 6; run the same command to continue" in err
    assert err.count("saved step") == 1 and "exitcode  : 75" in err

    process = launch(1, *command, "iters=6", "sample_every=0")
    out, err = finish(process)
    assert process.returncode == 0 and f"continues at step {saved[0]} of 6" in out, err
    process = launch(2, *words, f"run={tmp_path}/whole", "log_every=1", "iters=6", "sample_every=0")
    _, err = finish(process)
    assert process.returncode == 0, err
    one, two = (read_metrics(tmp_path / name / "stage2/metrics.jsonl") for name in ("run", "whole"))
    assert [r["step"] for r in one] == [1, 2, 3, 4, 5, 6] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    file = "stage2/model/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / name / file) for name in ("run", "whole"))
    assert one.keys() == two.keys()
    for key in one:  # AdamW divides by the gradient's size: rounding of a zero gradient becomes a full step of 1e-3
        assert (one[key] - two[key]).abs().max() <= 6 * 2e-3
        assert (one[key] - two[key]).abs().mean() <= 1e-4 * max(two[key].abs().mean(), 0.01), key
    assert all(v.dtype == torch.float32 for v in one.values())


def test_a_rank_that_dies_takes_the_others_with_it(words, tmp_path):
    process = start(tmp_path, SLOW, *words, f"run={tmp_path}/run", "iters=200", "save_every=1", "sample_every=0")
    ranks_of(process)[1].send_signal(signal.SIGKILL)
    (tmp_path / "go").touch()
    _, err = finish(process)  # collectives would wait for half an hour
    assert process.returncode != 0
    reported = [line for line in err.splitlines() if "rank" in line and "1 (local_rank: 1)" in line]
    assert reported and "exitcode  : -9" in err  # torchrun's own report of the first failure
    assert all("rank 1 of 2 has gone" in line for line in errors(err)) and len(errors(err)) <= 1
