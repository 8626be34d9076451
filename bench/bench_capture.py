"""Capture each operator in a CUDA graph and replay it: the replay must give the same bits as a plain call."""

import kernels
import pytest
import torch
from device_time import sampled
from once import KERNELS

pytestmark = kernels.RECORDED


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("kernel", KERNELS)
def bench_capture(benchmark, monkeypatch, kernel: str, name: str):
    if not kernels.GPU:
        pytest.skip("CUDA graphs need a GPU")
    kernels.use(monkeypatch, name)
    call = KERNELS[kernel](True)
    wanted = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for t in got:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), "the replay gives other bits"
    kernels.record(benchmark, f"captured {kernel}", name, sampled([graph.replay], 30))
