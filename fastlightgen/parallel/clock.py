"""Where the time of the steps goes, in seconds of the host; a part within a part counts for itself only.

On a GPU the host runs ahead and waits where it reads a number: for the loss (`forward`) and for the gradient norm
(`backward`), so these two hold the device's work without a synchronisation of their own. What the optimizer leaves
running is waited for by the next forward. `collectives` is the time that the host is blocked in them, between CPUs
mostly a wait for the slowest rank; what NCCL does beside the host counts where the host waits for it.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

PARTS = ("data", "forward", "backward", "optimizer")
REST = "rest"
COLLECTIVES = (
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter_tensor",
)


class Clock:
    """Counts while a step is under way."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((REST, *PARTS), 0.0)
        self.open: list[str] = []  # the parts under way, the innermost last
        self.steps, self.since = 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        self.steps, self.open, self.since = self.steps + 1, [REST], time.perf_counter()
        try:
            yield
        finally:
            self._book()
            self.open = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.open:
            yield
            return
        self._book()
        self.open.append(name)
        try:
            yield
        finally:
            self._book()
            self.open.pop()

    def _book(self) -> None:
        now, name = time.perf_counter(), self.open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def read(self) -> dict[str, float]:
        """Mean seconds per step since the last reading, and the shares of the parts in them, rounded down."""
        total = sum(self.seconds.values()) or 1.0
        shares = {f"share_{k}": math.floor(1e4 * v / total) / 1e4 for k, v in self.seconds.items() if k != REST}
        out = {"sec_per_step": round(total / max(1, self.steps), 4)} | shares
        self.restart()
        return out


clock = Clock()  # of this process


class Work:
    """A collective under way; waiting for it is time in collectives."""

    def __init__(self, work: dist.Work):
        self.work = work

    def wait(self, *args) -> Any:
        with clock.part("collectives"):
            return self.work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def count_collectives() -> None:
    """From now on the clock counts torch's collectives, whoever calls them: this package, DeepSpeed, attention."""

    def counted(function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **keys):
            with clock.part("collectives"):
                out = function(*args, **keys)
            return Work(out) if isinstance(out, dist.Work) else out

        return run

    for name in COLLECTIVES:
        function = getattr(dist, name)
        if function.__code__.co_filename != __file__:  # else done before
            setattr(dist, name, counted(function))
