"""Helpers that the kernel benches share: rotating inputs, the copy of the same bytes, the contenders, the record.

A row holds `us`, the median time on the GPU alone (device_time.py), its spread, and `host_us`, what the call costs the
host. `of_copy` is the bandwidth (`GB/s`) divided by that of a copy of the same bytes in the same process. The same
samples go to pytest-benchmark, so that its table and `--benchmark-json` show them.
Without a GPU the shapes are small, and the bench only checks that everything runs.
"""

import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from device_time import Samples, sampled
from torch import Tensor

from fastlightgen.ops import dispatch

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SIMT = not GPU and os.environ.get("FLG_BENCH_SIMT") == "1"  # the CUDA sources run on the CPU, as in the tests
L2_BYTES = 64 << 20  # bytes; inputs rotate through more memory than the cache holds
ROUNDS = 30 if GPU else 5
CONTENDERS = ["copy", "cuda", "eager", "triton", "torch.compile"]


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def rotate(make: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies of the inputs, enough that no call finds its inputs in the cache."""
    first = make()
    size = sum(t.nbytes for t in first.values())
    return [first] + [make() for _ in range(L2_BYTES // size if GPU else 0)]


@lru_cache
def copied(moved: int) -> Samples:
    """The time of a copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).fill_(1)
    pairs = [(torch.empty_like(source), source.clone()) for _ in range(1 + (L2_BYTES // moved if GPU else 0))]
    return sampled([lambda to=to, of=of: to.copy_(of) for to, of in pairs], ROUNDS)


def contender(monkeypatch: pytest.MonkeyPatch, name: str, op: Callable, reference: Callable) -> Callable:
    """The operator on one backend, or torch's own code."""
    if name == "eager":
        return reference
    if name == "torch.compile":
        return compiled(reference)
    use(monkeypatch, name)
    return op


def use(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Let the operators of this bench use one backend, or skip the bench."""
    if SIMT and backend == "cuda":
        extension = simt().extension()
        monkeypatch.setattr(dispatch, "extension", lambda: extension)
        monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    elif reason := dispatch._why_not(backend):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: backend)


def simt() -> ModuleType:
    """The shim of the tests, which builds the CUDA sources for the CPU."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    return importlib.import_module("simt")


def compiled(function: Callable) -> Callable:
    """Compile for these shapes alone, without the limit on recompilations that earlier shapes would count for."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def backward(op: Callable, cases: list[dict[str, Tensor]]) -> list[Callable[[], object]]:
    """Calls that run only the backward pass: every input's gradient, cotangents drawn once."""
    calls = []
    for case in cases:
        inputs = {name: t.requires_grad_() for name, t in case.items()}
        outputs = op(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = [torch.randn_like(out) for out in outputs]
        wanted = list(inputs.values())
        calls.append(lambda o=outputs, w=wanted, s=seeds: torch.autograd.grad(o, w, s, retain_graph=True))
    return calls


_fed: list[float] = []  # the clock's time while samples are fed


def clock() -> float:
    """pytest-benchmark's clock: the host's, except while `record` feeds it samples that were taken before."""
    return _fed[0] if _fed else time.perf_counter()


RECORDED = pytest.mark.benchmark(timer=clock)  # the mark of benches that call `record`


def feed(benchmark, seconds: Iterable[float]) -> None:
    """Give pytest-benchmark the samples, one per round."""
    seconds = list(seconds)
    left = itertools.cycle(seconds)  # more than one round per sample only if the command line asks for a profile

    def advance() -> None:
        _fed[0] += next(left)

    _fed.append(0.0)
    try:
        benchmark.pedantic(advance, rounds=len(seconds))
    finally:
        _fed.clear()


def record(benchmark, group: str, name: str, samples: Samples, dtype: torch.dtype = DTYPE, **columns: float) -> None:
    """Add a row to the record; conftest.py writes it to the results folder."""
    benchmark.group = f"{group} {dtype}".replace("torch.", "")
    name = f"{name} on the CPU shim" if SIMT and name == "cuda" else name
    benchmark.extra_info |= samples.columns() | columns | {"contender": name}
    if GPU:
        benchmark.extra_info["mhz"] = megahertz()
    feed(benchmark, samples.seconds)


def megahertz() -> int | None:
    """The clock of the multiprocessors now, right after the samples; None where it cannot be read."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # also errors of pynvml, which torch imports
        return None


def report(benchmark, group: str, name: str, calls: list[Callable[[], object]] | None, moved: int) -> None:
    """Time the calls (None: the copy itself) and write the columns into the record."""
    copy = copied(moved)
    samples = copy if calls is None else sampled(calls, ROUNDS)
    speed = {"GB/s": moved / samples.median / 1e9, "of_copy": copy.median / samples.median}
    record(benchmark, group, name, samples, **speed)
