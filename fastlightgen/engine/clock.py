"""Where the time of the steps goes, in seconds of the host; a part within a part counts for itself only.

On a GPU the host runs ahead and waits where it reads a number: for the loss (`forward`) and for the gradient norm
(`backward`), so these two hold the device's work without a synchronisation of their own. What the optimizer leaves
running is waited for by the next forward. `collectives` is the time blocked in those of `ranks`, which is mostly the
wait for the slowest rank; the ones inside DeepSpeed count where they happen.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("data", "forward", "backward", "optimizer")
REST = "rest"


class Clock:
    """Counts while a step is under way."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys((REST, *PARTS), 0.0)
        self.steps, self.open, self.since = 0, [], 0.0

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
