"""The number of CPU threads, and what a command says about it."""

import os
from pathlib import Path

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
        monkeypatch.setattr(threads, "own_choice", lambda: usual)
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


def test_the_choice_is_made_anew(machine, monkeypatch):
    """A core that is busy at first is used once it is free; a number that the user gave stays."""
    calls = machine(2, "", 1.0, 2)
    threads.set_threads(0)
    assert threads.again(0) == "" and calls == [1]
    monkeypatch.setattr(threads, "busy_cores", lambda: 0.0)
    assert threads.again(0) == "threads: 2, for 2 usable CPU cores (threads=N changes it)" and calls == [1, 2]
    monkeypatch.setattr(threads, "busy_cores", lambda: 1.0)
    assert threads.again(2) == "" and calls == [1, 2]


def test_cores_are_busy_by_the_system_s_own_count(monkeypatch, tmp_path):
    """Core 0 is busy for 30 of 100 ticks, core 1 for all of 50, core 2 is not ours; then core 0 is idle for 100."""
    states = [(100, 900, 0, 0), (130, 970, 50, 0), (130, 1070, 60, 40)]
    stat = tmp_path / "stat"
    turns = iter(states)

    def tick(seconds: float = 0.0) -> None:
        user, idle, user1, idle1 = next(turns)
        cores = (
            f"cpu0 {user - 10} 0 10 {idle - 5} 5 0 0 0\ncpu1 0 {user1} 0 {idle1} 0 0 0 0\ncpu2 {user * 9} 0 0 0 0 0 0 0"
        )
        stat.write_text(f"cpu 1 1\n{cores}\nintr 5\n")

    tick()
    monkeypatch.setattr(threads, "STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(threads.time, "sleep", tick)
    assert threads.busy_cores(windows=1) == pytest.approx(0.3 + 1.0)
    turns = iter(states)
    tick()
    assert threads.busy_cores(windows=2) == pytest.approx(0.0 + 0.2)  # the least of 1.3 and 0.2


def test_every_command_sets_its_threads_here():
    package = Path(threads.__file__).parents[1]
    own = {"threads.py", "step_generate.py"}  # the second one stands in exported folders, without this package
    assert {p.name for p in package.rglob("*.py") if "set_num_threads(" in p.read_text()} == own
