"""norm_modulate against its rivals and against a copy of the same bytes, measured in the same process.

Read the extra columns of `--benchmark-json`: `us` (median, by GPU events on a GPU, where the host clock sees launches),
`GB/s`, and `of_copy`, the fraction of the copy's bandwidth. Without a GPU the shape is small: it checks the path only.
"""

import importlib
import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from shapes import CPU_SHAPES, SHAPES

from fastlightgen.ops import dispatch
from fastlightgen.ops.norm_modulate import reference

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
L2_BYTES = 64 << 20  # inputs rotate through more memory than the cache holds


@lru_cache(maxsize=1)
def inputs(shape: tuple[int, int, int]) -> list[tuple]:
    """Enough copies of (out, x, scale, shift) that no call finds its x in the cache."""
    x = torch.randn(shape, device=DEVICE, dtype=DTYPE)
    copies = 1 + (L2_BYTES // (2 * x.nbytes) if GPU else 0)
    mods = [torch.randn(shape[0], 1, shape[2], device=DEVICE) for _ in range(2)]
    return [(torch.empty_like(x), x.clone(), *mods) for _ in range(copies)]


def times(call: Callable, cases: list[tuple], rounds: int = 30) -> float:
    """Median seconds of one call."""
    for case in cases[:3]:
        call(*case)
    taken = []
    for i in range(rounds):
        case = cases[i % len(cases)]
        if GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call(*case)
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call(*case)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@lru_cache
def copy_seconds(shape: tuple[int, int, int]) -> float:
    return times(lambda out, x, *_: out.copy_(x), inputs(shape))


def contender(name: str) -> Callable:
    """(out, x, scale, shift) -> None; the rivals allocate their result as they would in a model."""
    if name == "copy":
        return lambda out, x, scale, shift: out.copy_(x)
    if name == "eager":
        return lambda out, x, scale, shift: reference.norm_modulate(x, scale, shift, 1e-6)
    if name == "torch.compile":
        compiled = torch.compile(reference.norm_modulate)
        return lambda out, x, scale, shift: compiled(x, scale, shift, 1e-6)
    if reason := dispatch._why_not(name):
        pytest.skip(reason)
    forward = importlib.import_module(f"fastlightgen.ops.norm_modulate.{name}").forward

    def call(out, x, scale, shift):
        width = x.shape[-1]
        forward(out.view(-1, width), x.view(-1, width), scale[:, 0], shift[:, 0], x.shape[1], 1e-6)

    return call


@pytest.mark.parametrize("name", ["copy", "eager", "torch.compile", "triton", "cuda"])
@pytest.mark.parametrize("shape", list(SHAPES if GPU else CPU_SHAPES))
def bench_norm_modulate(benchmark, shape: str, name: str):
    size = (SHAPES if GPU else CPU_SHAPES)[shape]
    call, cases = contender(name), inputs(size)
    benchmark.group = f"norm_modulate {shape} {DTYPE}".replace("torch.", "")
    seconds = times(call, cases)
    moved = 2 * cases[0][1].nbytes  # x in, out out; the modulation rows are 1 in tokens
    benchmark.extra_info.update(
        {"us": seconds * 1e6, "GB/s": moved / seconds / 1e9, "of_copy": copy_seconds(size) / seconds, "contender": name}
    )
    benchmark.pedantic(lambda: call(*cases[0]), rounds=5, iterations=1, warmup_rounds=1)
