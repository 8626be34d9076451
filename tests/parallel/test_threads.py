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
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
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


@pytest.mark.parametrize("load, hint", [(0.3, 0), (0.6, 7), (5.2, 3), (40.0, 1)])
def test_a_busy_machine_is_said(machine, load, hint):
    machine(8, "", load, 8)
    line = threads.set_threads(0)
    assert line.endswith(f"; other programs compute here: threads={hint} may be faster" if hint else "changes it)")
    assert "other programs" not in threads.set_threads(1)
