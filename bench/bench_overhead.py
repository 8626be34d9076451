"""Time what a call costs the host beside its kernel: checks, dispatch, allocation. Runs on a CPU; launches do nothing.

The shapes are small, so that nothing else takes time. `us` is the best of many calls; `goal_us` is 12.
"""

import timeit
from types import SimpleNamespace

import kernels
import pytest
import torch

from fastlightgen.ops import dispatch, dmd_gradient, gate_residual_norm_modulate, norm_modulate, qk_norm_rope
from fastlightgen.ops import rope_factors as factors

GOAL = 12.0
X, MOD = torch.randn(1, 8, 64), torch.randn(1, 64)
ROPE, WEIGHT = factors((2, 2, 2), (4, 2, 2)), torch.ones(64)
V, ONE = torch.randn(1, 16), torch.ones(1)
CALLS = {
    "norm_modulate": lambda x: norm_modulate(x, MOD, MOD),
    "gate_residual_norm_modulate": lambda x: gate_residual_norm_modulate(x, x, MOD, MOD, MOD),
    "qk_norm_rope": lambda x: qk_norm_rope(x, x, WEIGHT, WEIGHT, ROPE),
    "dmd_gradient": lambda x: dmd_gradient(V, V, ONE, V, V, V, V, ONE, ONE),
}


def best(call) -> float:
    """Seconds of one call: the fastest of many short series, because other processes slow the rest."""
    return min(timeit.repeat(call, number=20, repeat=500)) / 20


@pytest.mark.parametrize("way", ["inference", "training"])
@pytest.mark.parametrize("op", CALLS)
def bench_overhead(benchmark, monkeypatch, op: str, way: str):
    if way == "training" and op == "dmd_gradient":
        pytest.skip("it has no gradient")

    def nothing(_fields) -> int:
        return 0

    class Launches(SimpleNamespace):
        dmd_gradient_blocks = 1

        def __getattr__(self, name: str):
            return (lambda *_: 1) if name.endswith("_runs") else nothing

    extension = Launches()
    monkeypatch.setattr(dispatch, "extension", lambda: extension)
    monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "cuda")
    x = X.clone().requires_grad_(way == "training")
    with torch.set_grad_enabled(way == "training"):
        call = lambda: CALLS[op](x)  # noqa: E731
        kernels.record(benchmark, f"call overhead, {way}", op, best(call), goal_us=GOAL)
        benchmark.pedantic(call, rounds=3, iterations=10)
