"""A clock that divides the time of the steps into parts, in seconds on the host.

Parts may nest; time in an inner part does not count for the outer one. On a GPU the host runs ahead. It waits when it
reads the loss (in `forward`) and the gradient norm (in `backward`), so these parts contain the GPU's work, and the
clock needs no synchronisation of its own. GPU work that the optimizer leaves running counts for the next forward.
`collectives` is the time in which the host is blocked in a collective; between CPUs that is mostly a wait for the
slowest rank. NCCL's work beside the host counts where the host waits for it.
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
    """Counts seconds per part, inside `step` only; saving and sampling are not counted."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Set all counts to zero."""
        self.seconds: dict[str, float] = dict.fromkeys((REST, *PARTS), 0.0)
        self.open: list[str] = []  # the parts entered and not yet left, innermost last
        self.steps, self.since = 0, 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of one step. Time outside of its parts is booked as REST."""
        self.steps, self.open, self.since = self.steps + 1, [REST], time.perf_counter()
        try:
            yield
        finally:
            self._book()
            self.open = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context of one part of a step; outside of a step it does nothing."""
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
        """Add the seconds since the last call to the innermost part."""
        now, name = time.perf_counter(), self.open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def read(self) -> dict[str, float]:
        """Return the mean seconds per step since the last call, and each part's fraction of them; then restart.

        Fractions are rounded down, so that their sum cannot exceed 1.
        """
        total = sum(self.seconds.values()) or 1.0
        fractions = {f"share_{k}": math.floor(1e4 * v / total) / 1e4 for k, v in self.seconds.items() if k != REST}
        out = {"sec_per_step": round(total / max(1, self.steps), 4)} | fractions
        self.restart()
        return out


clock = Clock()  # the one clock of this process


class Work:
    """Wraps an asynchronous collective, so that waiting for it counts as time in collectives."""

    def __init__(self, work: dist.Work):
        self.work = work

    def wait(self, *args) -> Any:
        with clock.part("collectives"):
            return self.work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)


def count_collectives() -> None:
    """Replace torch's collectives by versions that the clock counts, also when DeepSpeed calls them."""

    def counted(function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **keys):
            with clock.part("collectives"):
                out = function(*args, **keys)
            return Work(out) if isinstance(out, dist.Work) else out

        return run

    for name in COLLECTIVES:
        function = getattr(dist, name)
        if function.__code__.co_filename != __file__:  # already replaced: its code is in this file
            setattr(dist, name, counted(function))
