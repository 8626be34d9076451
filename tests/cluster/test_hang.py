"""A rank that stands still is named with its place, long before a collective fails by its timeout."""

import importlib.util

import pytest
import torch
from helpers import BLOCKS, crop, small_wan, write_inputs
from launch import finish, launch

from fastlightgen.engine.hang import HERE, Here, Place, note_walks, verdict
from fastlightgen.models.base import Stream
from fastlightgen.world.source import ShapesSource

# The train command, in which rank 1 stands still in step 3.
CODE = """
import os, time
from fastlightgen.config import main
from fastlightgen.engine import hang
from fastlightgen.models.wan.model import WanModel
from fastlightgen.stages.prune import Prune
from fastlightgen.train import train
RANK = int(os.environ["RANK"])
enter, check = hang.HangWatch.__enter__, Prune.check
def kept(self):
    hang.watch, self.pause = self, 0.5
    return enter(self)
def impatient(self, step):
    if step == 2:
        hang.watch.limit = 10.0
    return check(self, step)
hang.HangWatch.__enter__, Prune.check = kept, impatient
def sleep():
    time.sleep(1000)
{patch}
main(train, "train")
"""
IN_A_BLOCK = """
loss = Prune.loss
def asleep(self, step):
    if RANK == 1 and step == 2:
        self.net.blocks[2].register_forward_pre_hook(lambda *_: sleep())
    return loss(self, step)
Prune.loss = asleep
"""
IN_A_BACKWARD = """
loss = Prune.loss
def asleep(self, step):
    if RANK == 1 and step == 2:
        list(self.net.blocks[1].parameters())[0].register_hook(lambda _: sleep())
    return loss(self, step)
Prune.loss = asleep
"""
FROZEN = (
    """
import signal
def sleep():
    os.kill(os.getpid(), signal.SIGSTOP)
"""
    + IN_A_BLOCK
)
IN_THE_DATA = """
updates = Prune.updates
def asleep(self, step):
    while RANK == 1 and step == 2:
        pass
    return updates(self, step)
Prune.updates = asleep
"""
STUCK = {
    "block": (IN_A_BLOCK, ["drop=joint"], "step 3, update of student, forward, student, block 2 of 4 (stream 2 of 2)"),
    "backward": (
        IN_A_BACKWARD,
        ["zero=2"],
        "step 3, update of student, backward, student, block 1 of 4 (stream 2 of 2)",
    ),
    "frozen": (FROZEN, ["zero=1"], ""),
    "data": (IN_THE_DATA, [], "step 3, the step's data"),
}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("where", ["block", *(pytest.param(k, marks=pytest.mark.slow) for k in [*STUCK][1:])])
def test_the_rank_that_stands_still_is_named(tmp_path, where):
    """The error comes some 10 seconds after step 2; a collective would wait for half an hour."""
    patch, extra, place = STUCK[where]
    words = [w for w in write_inputs(tmp_path)[2] if not w.startswith("iters")]
    (tmp_path / "train.py").write_text(CODE.format(patch=patch))
    command = ["stage=2", "engine=deepspeed", *words, f"run={tmp_path}/run", "iters=9", "save_every=1", "timeout=1800"]
    process = launch(2, str(tmp_path / "train.py"), *command, *extra, "sample_every=0", module=False)
    _, err = finish(process)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and process.returncode != 0, err
    assert "while rank 0 waits at stage 2, step 3, update of student, " in lines[0]
    state = f"is at stage 2, {place}, while" if place else "has stopped, last seen at stage 2, step"
    assert f"error: nothing has moved for {lines[0].split()[5]} s: rank 1 of 2 {state}" in lines[0]
    assert "continue from the last checkpoint" in lines[0] and "exitcode  : 2 " in err
    assert (tmp_path / "run/stage2/checkpoints/step-000001").is_dir()


def test_the_verdict():
    at = [Place(7, "B"), Place(7, "B"), Place(5, "A"), Place(7, "B")]
    assert "for 10 s: rank 2 of 4 is at A, while the other 3 wait at B; run the same" in verdict(at, 10.2)
    assert "for 3 s: all 2 ranks are at B; run the same" in verdict(at[:2], 3)
    assert "rank 1 of 2 has stopped, last seen at B, while rank 0 waits at B;" in verdict(
        [at[0], Place(7, "B", True)], 3
    )
    assert "rank 0 of 2 is at A; " not in verdict([Place(5, "A"), Place(7, "B")], 3)
    both = [Place(7, "B", True), Place(5, "A")]
    assert "rank 1 of 2 is at A, while rank 0 waits at B;" in verdict(both, 3)
    many = [Place(r, f"{r}") for r in range(6)]
    assert "rank 2 of 6 is at 2 and 2 more, while rank 5 waits at 5" in verdict(many, 3)


def test_a_walk_leaves_its_place():
    """The places of a walk and its backward pass: the blocks in order, with the streams that run each."""
    net, seen = small_wan(), []
    note_walks(net, "net")
    batch = crop(ShapesSource(0).batch(0, 1))
    real = Here.at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Here, "at", lambda self, *args, **keys: (real(self, *args, **keys), seen.append(self.text()))[0])
        HERE.at("data", stage=3, step=5, role="student")
        out = net.walk(batch.x0, 0.5, [Stream(batch.cond, [0, 3], grad=True), Stream(batch.null)])
        out[0].sum().backward()
    place = "stage 3, step 5, update of student, "
    assert seen[:2] == [f"{place}data", f"{place}net starts a walk of 2 streams"]
    forward = [
        f"{place}forward, net, block {i} of {BLOCKS} (stream {s} of 2)" for i, s in enumerate(("1+2", 2, 2, "1+2"))
    ]
    assert seen[2 : 2 + BLOCKS] == forward
    backward = seen[2 + BLOCKS :]
    assert all(t.startswith(f"{place}backward, net, block") for t in backward)
    assert [t.split("block ")[1][0] for t in backward] == ["3", "0"]  # only these blocks carry gradient
    assert torch.isfinite(out[0]).all()
