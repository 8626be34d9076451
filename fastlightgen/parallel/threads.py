"""The CPU threads of a command."""

import math
import os
import time
from functools import cache
from pathlib import Path

import torch

STAT = Path("/proc/stat")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "200000 100000" are two cores, "max 100000" all


def set_threads(threads: int) -> str:
    """Set torch's threads. Return a line that says how many.

    0: torch's own choice, but no more than the usable cores that no other program keeps busy. Threads wait for each
    other after every operation: with fewer cores than threads all of them wait for the slowest, many times as long.
    """
    cores = usable_cores()
    wanted = threads or min(own_choice(), cores)
    free = max(1, cores - round(busy_cores())) if wanted > 1 else cores  # one thread can leave no core to others
    used = threads or min(wanted, free)
    if used != torch.get_num_threads():
        torch.set_num_threads(used)
    line = f"threads: {used}, for {cores} usable CPU cores"
    if not threads:
        line += f", {cores - free} of them busy" * (free < cores) + " (threads=N changes it)"
    elif used > free:
        line += f"; other programs compute here: threads={free} may be faster"
    return line


@cache
def own_choice() -> int:
    """The threads that torch takes when nobody sets them; asked before the first change."""
    return torch.get_num_threads()


def again(threads: int) -> str:
    """Choose anew between two parts of a long command, if the user left the choice open. Return a line on a change."""
    before = torch.get_num_threads()
    line = "" if threads else set_threads(0)
    return line if torch.get_num_threads() != before else ""


def usable_cores() -> int:
    """The cores that this process may use, by its affinity mask and by the quota of its container."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = QUOTA.read_text().split()[:2] if QUOTA.is_file() else ("max", "")
    return mask if quota == "max" else max(1, min(mask, math.ceil(int(quota) / int(period))))


def busy_cores(windows: int = 4, seconds: float = 0.1) -> float:
    """How many of the usable cores other programs keep busy; 0 where it is unknown.

    The least of some moments: what runs for a short time does not count.
    """
    if not (STAT.is_file() and hasattr(os, "sched_getaffinity")):
        return 0.0
    found, before = [], times()
    for _ in range(windows):
        time.sleep(seconds)
        after, busy = times(), 0.0
        for core in os.sched_getaffinity(0) & before.keys() & after.keys():
            idle, total = (now - then for now, then in zip(after[core], before[core], strict=True))
            busy += 1 - idle / total if total else 0.0
        found.append(busy)
        before = after
    return min(found)


def times() -> dict[int, tuple[int, int]]:
    """The time that each core was idle, and its whole time, in the system's ticks."""
    found = {}
    for line in STAT.read_text().splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(n) for n in numbers[:8]]  # user nice system idle iowait irq softirq steal
            found[int(name[3:])] = ticks[3] + ticks[4], sum(ticks)
    return found
