"""The parts of a step's time: exact with a fake clock, plausible in a real run."""

import time as real
from types import SimpleNamespace

import pytest
from helpers import run_train, write_inputs

from fastlightgen.engine.log import read_metrics
from fastlightgen.parallel import clock as module
from fastlightgen.parallel.clock import PARTS, Clock


@pytest.fixture
def time(monkeypatch):
    class Time:
        now = 100.0

        def perf_counter(self):
            return self.now

        def passes(self, seconds):
            self.now += seconds

    time = Time()
    monkeypatch.setattr(module, "time", time)
    return time


def test_an_inner_part_does_not_count_for_the_outer_one(time):
    clock = Clock()
    for _ in range(2):
        with clock.step():
            time.passes(1)
            with clock.part("forward"):
                time.passes(2)
                with clock.part("data"):
                    time.passes(1)
                time.passes(1)
                with clock.part("collectives"):
                    time.passes(3)
            with clock.part("backward"):
                time.passes(2)
        time.passes(50)  # saving and sampling happen outside of steps
        with clock.part("data"):
            time.passes(7)
    assert clock.read() == {
        "sec_per_step": 10.0,
        "share_data": 0.1,
        "share_forward": 0.3,
        "share_backward": 0.2,
        "share_optimizer": 0.0,
        "share_collectives": 0.3,
    }
    assert clock.read()["share_forward"] == 0 and "share_collectives" not in clock.read()


def test_a_step_that_fails_leaves_no_part_open(time):
    clock = Clock()
    with pytest.raises(ValueError), clock.step(), clock.part("forward"):
        raise ValueError
    with clock.part("data"):
        time.passes(5)
    assert clock.read()["share_data"] == 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shares_of_a_run(stage, tmp_path, monkeypatch):
    """Measured in CPU time of the training thread, which does not run while a busy machine lets the thread wait."""
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=real.thread_time))
    inputs = write_inputs(tmp_path / "inputs")
    run_train(f"stage={stage}", f"run={tmp_path}", *inputs[stage], "sample_every=0")
    lines = read_metrics(tmp_path / f"stage{stage}/metrics.jsonl")
    assert len(lines) == 4
    for line in lines:
        shares = {k: v for k, v in line.items() if k.startswith("share_")}
        assert set(shares) == {f"share_{p}" for p in PARTS}  # one process has no collectives
        assert all(v > 0 for v in shares.values()) and 0.5 < sum(shares.values()) <= 1
