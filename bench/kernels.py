"""Helpers that the kernel benches share: rotating inputs, GPU clocks, the copy of the same bytes, the contenders.

FLG_BENCH_ROWS and `--benchmark-json` hold the columns. `us` is the median by GPU events, because a host clock would
measure launches. `of_copy` is the bandwidth (`GB/s`) divided by that of a copy of the same bytes in the same process.
Without a GPU the shapes are small, and the bench only checks that everything runs.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from fastlightgen.ops import dispatch

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
L2_BYTES = 64 << 20  # bytes; inputs rotate through more memory than the cache holds
CONTENDERS = ["copy", "eager", "torch.compile", "triton", "cuda"]
PEERS = ["liger layer_norm", "quack rmsnorm"]  # norms without modulation that move the same bytes, if installed


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def rotate(make: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Copies of the inputs, enough that no call finds its inputs in the cache."""
    first = make()
    size = sum(t.nbytes for t in first.values())
    return [first] + [make() for _ in range(L2_BYTES // size if GPU else 0)]


def times(calls: list[Callable[[], object]], rounds: int = 30) -> float:
    """Median seconds of one call; `calls` do the same on different memory."""
    for call in calls[:3]:
        call()
    taken = []
    for i in range(rounds):
        call = calls[i % len(calls)]
        if GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@lru_cache
def copy_seconds(moved: int) -> float:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).fill_(1)
    pairs = [(torch.empty_like(source), source.clone()) for _ in range(1 + (L2_BYTES // moved if GPU else 0))]
    return times([lambda to=to, of=of: to.copy_(of) for to, of in pairs])


def contender(monkeypatch: pytest.MonkeyPatch, name: str, op: Callable, reference: Callable) -> Callable:
    """The operator on one backend, or torch's own code."""
    if name == "eager":
        return reference
    if name == "torch.compile":
        return compiled(reference)
    if reason := dispatch._why_not(name):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: name)
    return op


def compiled(function: Callable) -> Callable:
    """Compile for these shapes alone, without the limit on recompilations that earlier shapes would count for."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def peer(name: str, cases: list[dict[str, Tensor]]) -> tuple[Callable, list[dict[str, Tensor]]]:
    """A public norm and its inputs, in place of norm_modulate."""
    if not GPU:
        pytest.skip("it needs a GPU")
    if name.startswith("liger"):
        norm = pytest.importorskip("liger_kernel.ops.layer_norm").LigerLayerNormFunction

        def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return norm.apply(x, weight, bias, 1e-6)
    else:
        rmsnorm = pytest.importorskip("quack").rmsnorm

        def op(x: Tensor, weight: Tensor) -> Tensor:
            return rmsnorm(x.flatten(0, -2), weight, eps=1e-6).view_as(x)

    dim = cases[0]["x"].shape[-1]
    names = ("weight", "bias") if name.startswith("liger") else ("weight",)
    return op, [{"x": case["x"]} | {n: draw(dim) for n in names} for case in cases]


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


def record(benchmark, group: str, name: str, seconds: float, **columns: float) -> None:
    """Add a row to the record, and at once to the file FLG_BENCH_ROWS, so that a bench that is killed keeps it."""
    benchmark.group = f"{group} {DTYPE}".replace("torch.", "")
    row = {"us": seconds * 1e6, **columns, "contender": name}
    benchmark.extra_info.update(row)
    if file := os.environ.get("FLG_BENCH_ROWS"):
        with open(file, "a") as rows:
            rows.write(json.dumps({"group": benchmark.group, **row}) + "\n")


def report(benchmark, group: str, name: str, calls: list[Callable[[], object]] | None, moved: int) -> None:
    """Time the calls (None: the copy itself) and write the columns into the record."""
    copied = copy_seconds(moved)
    seconds = copied if calls is None else times(calls)
    record(benchmark, group, name, seconds, **{"GB/s": moved / seconds / 1e9, "of_copy": copied / seconds})
    benchmark.pedantic((calls or [lambda: None])[0], rounds=3, iterations=1)
