"""Time what a call costs the host: checks, dispatch, allocation, the launcher's arithmetic, and on a GPU the launch.

The calls go through the real launcher of csrc/, with the rows of Wan 14B at 480p and 64 channels, so that the GPU is
done before the host is. Without a GPU the launchers are built by the host compiler for the 132 multiprocessors of an
H100, and the launch itself does nothing. `us` is the best of many short series; `goal_us` is 8, with autograd 12.
"""

import timeit

import kernels
import pytest
import torch
from device_time import Samples
from kernels import DEVICE, DTYPE, GPU

from fastlightgen.ops import dispatch, dmd_gradient, gate_residual_norm_modulate, norm_modulate, qk_norm_rope
from fastlightgen.ops import rope_factors as factors

pytestmark = kernels.RECORDED
GOALS = {"inference": 8.0, "training": 12.0}
SERIES, CALLS_EACH = 200, 20  # the launch queue of a GPU holds more than one series
GRID = (21, 30, 52)
X = torch.randn(1, GRID[0] * GRID[1] * GRID[2], 64, device=DEVICE, dtype=DTYPE)
MOD, WEIGHT = torch.randn(1, 64, device=DEVICE), torch.ones(64, device=DEVICE)
ROPE = factors(GRID, (4, 2, 2), device=torch.device(DEVICE))
V, ONE = torch.randn(1, 16, device=DEVICE), torch.ones(1, device=DEVICE)
CALLS = {
    "norm_modulate": lambda x: norm_modulate(x, MOD, MOD),
    "gate_residual_norm_modulate": lambda x: gate_residual_norm_modulate(x, x, MOD, MOD, MOD),
    "qk_norm_rope": lambda x: qk_norm_rope(x, x, WEIGHT, WEIGHT, ROPE),
    "dmd_gradient": lambda x: dmd_gradient(V, V, ONE, V, V, V, V, ONE, ONE),
}


def series(call) -> list[float]:
    """Seconds of one call, once per series; the GPU is idle when a series begins."""
    idle = torch.cuda.synchronize if GPU else "pass"
    return [s / CALLS_EACH for s in timeit.repeat(call, setup=idle, number=CALLS_EACH, repeat=SERIES)]


def use_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA backend: the compiled extension, or without a GPU its launchers alone."""
    if GPU:
        return kernels.use(monkeypatch, "cuda")
    shim = kernels.simt()
    if shim.COMPILER is None:
        pytest.skip("g++ is not installed")
    extension = shim.launchers()
    monkeypatch.setattr(dispatch, "extension", lambda: extension)
    monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "cuda")


@pytest.mark.parametrize("way", GOALS)
@pytest.mark.parametrize("op", CALLS)
def bench_overhead(benchmark, monkeypatch, op: str, way: str):
    if way == "training" and op == "dmd_gradient":
        pytest.skip("it has no gradient")
    use_launchers(monkeypatch)
    x = X.clone().requires_grad_(way == "training")
    with torch.set_grad_enabled(way == "training"):
        samples = Samples(series(lambda: CALLS[op](x)))
    columns = {"us": min(samples.seconds) * 1e6, "goal_us": GOALS[way]}
    kernels.record(benchmark, f"call overhead, {way}", op, samples, **columns)
