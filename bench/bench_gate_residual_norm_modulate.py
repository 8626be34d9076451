"""The deferred residual with its norm, forward and backward, against its rivals and a copy (see kernels.py)."""

import kernels
import pytest
from shapes import CPU_SHAPES, SHAPES

from fastlightgen.ops import gate_residual_norm_modulate, gate_residual_norm_modulate_fork
from fastlightgen.ops.gate_residual_norm_modulate import reference

SIZES = SHAPES if kernels.GPU else CPU_SHAPES
TENSORS = {"forward": 4, "backward": 6}  # x, y in, x', h out; dh, dx', x', y in, dx, dy out
OPS = gate_residual_norm_modulate, reference.gate_residual_norm_modulate
FORK = gate_residual_norm_modulate_fork, reference.gate_residual_norm_modulate_fork


@pytest.mark.parametrize("name", kernels.CONTENDERS)
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("shape", SIZES)
def bench_gate_residual_norm_modulate(benchmark, monkeypatch, shape: str, way: str, name: str):
    measure(benchmark, monkeypatch, shape, way, name, ("gate", "scale", "shift"), OPS, TENSORS[way])


@pytest.mark.parametrize("name", kernels.CONTENDERS)
@pytest.mark.parametrize("way", TENSORS)
def bench_fork(benchmark, monkeypatch, way: str, name: str):
    """Two successors: one tensor more each way. At one shape: a walk has one fork."""
    mods = ("gate", "scale", "shift", "scale2", "shift2")
    measure(benchmark, monkeypatch, next(iter(SIZES)), way, name, mods, FORK, TENSORS[way] + 1)


def measure(benchmark, monkeypatch, shape, way, name, mods, ops, tensors) -> None:
    batch, tokens, dim = SIZES[shape]

    def make():
        tables = {m: kernels.draw(batch, dim, dtype=kernels.torch.float32) for m in mods}
        return {v: kernels.draw(batch, tokens, dim) for v in ("x", "y")} | tables

    moved = tensors * batch * tokens * dim * kernels.DTYPE.itemsize
    calls = None
    if name != "copy":
        op, cases = kernels.contender(monkeypatch, name, *ops), kernels.rotate(make)
        calls = kernels.backward(op, cases) if way == "backward" else [lambda c=c: op(**c) for c in cases]
    kernels.report(benchmark, f"{ops[0].__name__} {way} {shape}", name, calls, moved)
