"""The CPU threads of a command."""

import math
import os
from pathlib import Path

import torch

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "200000 100000" are two cores, "max 100000" all


def set_threads(threads: int) -> str:
    """Set torch's threads; 0: torch's own choice, but no more than usable cores. Return a line that says how many."""
    cores = usable_cores()
    if threads or torch.get_num_threads() > cores:
        torch.set_num_threads(threads or cores)
    used = torch.get_num_threads()
    line = f"threads: {used}, for {cores} usable CPU cores" + " (threads=N changes it)" * (not threads)
    free = max(1, cores - round(load()))
    if used > free:
        line += f"; other programs compute here: threads={free} may be faster"
    return line


def usable_cores() -> int:
    """The cores that this process may use, by its affinity mask and by the quota of its container."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = QUOTA.read_text().split()[:2] if QUOTA.is_file() else ("max", "")
    return mask if quota == "max" else max(1, min(mask, math.ceil(int(quota) / int(period))))


def load() -> float:
    """The mean number of running programs in the last minute; 0 where it is unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
