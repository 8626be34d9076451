"""Pieces of work that wait for each other, several processes at a time."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastlightgen.sweeps.processes import begin


@dataclass
class Work:
    """A call that a process of its own makes."""

    call: Callable[..., object]
    args: Sequence[Any]
    after: tuple[str, ...] = ()  # the names of what must have ended


def run(todo: Mapping[str, Work], at_once: int, logs: Path) -> list[str]:
    """Do the work, what comes first in `todo` first; return the names of what failed or waits for what failed."""
    left, running, ended = dict(todo), dict[str, tuple[BaseProcess, float]](), set[str]()
    try:
        while running or any(ended.issuperset(work.after) for work in left.values()):
            for name in [name for name, work in left.items() if ended.issuperset(work.after)]:
                if len(running) == at_once:
                    break
                work = left.pop(name)
                running[name] = begin(work.call, work.args, logs / f"{name}.txt"), time.monotonic()
            wait([process.sentinel for process, _ in running.values()])
            for name, (process, began) in list(running.items()):
                if process.exitcode is not None:
                    running.pop(name)
                    how = "failed" if process.exitcode else "done"
                    print(f"{how}: {name}, {time.monotonic() - began:.1f} s", flush=True)
                    ended |= set() if process.exitcode else {name}
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    return [name for name in todo if name not in ended]
