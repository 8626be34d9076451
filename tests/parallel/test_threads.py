"""The number of CPU threads, and what a command says about it."""

import os

import pytest
import torch

from fastlightgen.parallel import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(mask, quota, load, torch's own choice)` describes a machine; returns the calls of set_num_threads."""

    def make(mask: int, quota: str, load: float, usual: int) -> list[int]:
        calls: list[int] = []
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(mask)))
        monkeypatch.setattr(threads, "QUOTA", tmp_path / ("cpu.max" if quota else "none"))
        monkeypatch.setattr(threads, "busy_cores", lambda: load)
        monkeypatch.setattr(torch, "set_num_threads", calls.append)
        monkeypatch.setattr(torch, "get_num_threads", lambda: calls[-1] if calls else usual)
        return calls

    return make


@pytest.mark.parametrize(
    "mask, quota, usual, cores, used",
    [
        (64, "", 32, 64, 32),  # torch takes one thread for two hyperthreads
        (4, "", 32, 4, 4),  # taskset, Slurm
        (64, "200000 100000\n", 32, 2, 2),  # a container with two cores
        (64, "150000 100000\n", 32, 2, 2),
        (64, "max 100000\n", 32, 64, 32),
        (8, "10000 100000\n", 1, 1, 1),
    ],
)
def test_no_more_threads_than_usable_cores(machine, mask, quota, usual, cores, used):
    calls = machine(mask, quota, 0.0, usual)
    assert threads.set_threads(0) == f"threads: {used}, for {cores} usable CPU cores (threads=N changes it)"
    assert calls == ([] if used == usual else [used])


def test_a_given_number_is_taken(machine):
    calls = machine(2, "", 0.0, 2)
    assert threads.set_threads(5).startswith("threads: 5, for 2 usable CPU cores") and calls == [5]


@pytest.mark.parametrize("load, used", [(0.3, 8), (0.6, 7), (5.2, 3), (40.0, 1)])
def test_busy_cores_are_left_to_others(machine, load, used):
    calls = machine(8, "", load, 8)
    line = threads.set_threads(0)
    assert line.startswith(f"threads: {used}, for 8 usable CPU cores") and calls == ([] if used == 8 else [used])
    assert (f", {8 - used} of them busy" in line) == (used < 8)
    given = threads.set_threads(8)
    assert (f"; other programs compute here: threads={used} may be faster" in given) == (used < 8)


def test_cores_are_busy_by_the_system_s_own_count(monkeypatch, tmp_path):
    """Core 0 was busy for 30 of 100 ticks, core 1 for all of 50, core 2 is not ours."""
    before = "cpu 1 1\ncpu0 100 0 0 900 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 0 0 0 0 0 0 0 0\nintr 5\n"
    after = "cpu 1 1\ncpu0 120 0 10 960 10 0 0 0\ncpu1 0 50 0 0 0 0 0 0\ncpu2 90 0 0 0 0 0 0 0\nintr 6\n"
    (tmp_path / "stat").write_text(before)
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: (tmp_path / "stat").write_text(after))
    assert threads.busy_cores() == pytest.approx(0.3 + 1.0)
