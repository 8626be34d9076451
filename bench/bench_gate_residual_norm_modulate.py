"""The deferred residual with its norm, forward and backward, against its rivals and a copy (see kernels.py)."""

import kernels
import pytest
from shapes import CPU_SHAPES, SHAPES

from fastlightgen.ops import gate_residual_norm_modulate, gate_residual_norm_modulate_fork
from fastlightgen.ops.gate_residual_norm_modulate import reference

SIZES = SHAPES if kernels.GPU else CPU_SHAPES
# x, y in, x', h out; dh, dx', x', y in, dx, dy out. With two successors one more each way.
TENSORS = {"forward": 4, "backward": 6, "fork forward": 5, "fork backward": 7}


@pytest.mark.parametrize("name", kernels.CONTENDERS)
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("shape", SIZES)
def bench_gate_residual_norm_modulate(benchmark, monkeypatch, shape: str, way: str, name: str):
    batch, tokens, dim = SIZES[shape]
    fork = way.startswith("fork")
    if fork and shape not in ("wan-14b-480p", *CPU_SHAPES):
        pytest.skip("two successors are measured at one shape: a walk has one fork")

    def make():
        names = ("gate", "scale", "shift", *(("scale2", "shift2") if fork else ()))
        mods = {m: kernels.draw(batch, dim, dtype=kernels.torch.float32) for m in names}
        return {v: kernels.draw(batch, tokens, dim) for v in ("x", "y")} | mods

    moved = TENSORS[way] * batch * tokens * dim * kernels.DTYPE.itemsize
    calls = None
    if name != "copy":
        ops = (gate_residual_norm_modulate, reference.gate_residual_norm_modulate)
        if fork:
            ops = (gate_residual_norm_modulate_fork, reference.gate_residual_norm_modulate_fork)
        op, cases = kernels.contender(monkeypatch, name, *ops), kernels.rotate(make)
        calls = kernels.backward(op, cases) if way.endswith("backward") else [lambda c=c: op(**c) for c in cases]
    kernels.report(benchmark, f"gate_residual_norm_modulate {way} {shape}", name, calls, moved)
