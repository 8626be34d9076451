"""Time of calls on the GPU alone: the GPU spins while the host queues a call, so that it never waits for a launch.

On an idle GPU two events around a call time the host: a call costs it 8 to 17 us, and many kernels take the GPU less.
So each sample queues a spin, an event, the call, and an event. If the GPU still spins when the host is done, everything
between the two events was queued, and their distance is the call's time on the GPU. If not, the sample is repeated with
a longer spin. A call that itself waits for the GPU can never be queued: its samples are marked, they hold the host's
time.

Without a GPU a host clock takes the time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

SPIN = 100e-6  # seconds; at least this long, and twice the host's time
LONGEST = 50e-3  # seconds; a call that is not queued within this waits for the GPU


@dataclass
class Samples:
    """The seconds of one call, several times."""

    seconds: list[float] = field(default_factory=list)  # on the GPU, or without one by the host's clock
    host: float | None = None  # median seconds that the host takes to queue the call; None without a GPU
    waits: bool = False  # the host was not ahead of the GPU: the samples contain its time

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def columns(self) -> dict[str, float | int | bool]:
        """Median and spread (the 10th and 90th percentile) in microseconds, for a row of results."""
        ordered, last = sorted(self.seconds), len(self.seconds) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        out = {"us": self.median * 1e6, "us_low": low * 1e6, "us_high": high * 1e6, "rounds": last + 1}
        out |= {} if self.host is None else {"host_us": self.host * 1e6}
        return out | ({"waits": True} if self.waits else {})


def sampled(calls: Sequence[Callable[[], object]], rounds: int) -> Samples:
    """Time `rounds` calls after a warm-up; `calls` do the same on different memory."""
    for call in calls[:3]:
        call()
    in_turn = [calls[i % len(calls)] for i in range(rounds)]
    return _on_gpu(in_turn) if torch.cuda.is_available() else Samples([_host_seconds(call) for call in in_turn])


def _host_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(calls: Sequence[Callable[[], object]]) -> Samples:
    torch.cuda.synchronize()
    rate = _cycles_per_second()
    spin = max(SPIN, 2 * _host_seconds(calls[0]))
    torch.cuda.synchronize()
    out, hosts = Samples(), []
    for call in calls:
        seconds, host, queued = _one(call, int(spin * rate))
        while not queued and spin < LONGEST:
            spin *= 2
            seconds, host, queued = _one(call, int(spin * rate))
        out.waits |= not queued
        out.seconds.append(seconds)
        hosts.append(host)
    out.host = statistics.median(hosts)
    return out


def _one(call: Callable[[], object], cycles: int) -> tuple[float, float, bool]:
    """Return the call's seconds on the GPU, those of the host, and whether all of it was queued during the spin."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    start.record()
    host = _host_seconds(call)
    end.record()
    queued = not start.query()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host, queued


def _cycles_per_second() -> float:
    """The rate of the spin's clock, from a spin of about a millisecond; the second one runs at full clock."""
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(2_000_000)
        end.record()
        torch.cuda.synchronize()
    return 2_000_000 / (start.elapsed_time(end) / 1e3)
