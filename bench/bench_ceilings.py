"""Measure what this GPU can do at best: a copy, a matrix product, and the time between two events around nothing."""

import kernels
import pytest
import torch
from device_time import sampled
from kernels import GPU, draw

pytestmark = kernels.RECORDED
BYTES, SIDE = (2 << 30, 8192) if GPU else (1 << 20, 128)  # bytes moved by the copy; rows and columns of the matrices


@pytest.mark.parametrize("name", ["copy", "product", "nothing"])
def bench_ceilings(benchmark, name: str):
    if name == "copy":
        samples = kernels.copied(BYTES)
        columns = {"GB/s": BYTES / samples.median / 1e9}
    elif name == "product":
        a, b = draw(SIDE, SIDE), draw(SIDE, SIDE)
        samples = sampled([lambda: torch.mm(a, b)], kernels.ROUNDS)
        columns = {"TFLOP/s": 2 * SIDE**3 / samples.median / 1e12}
    else:
        samples, columns = sampled([lambda: None], kernels.ROUNDS), {}
    kernels.record(benchmark, "ceilings", name, samples, **columns)
