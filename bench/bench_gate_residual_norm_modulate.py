"""Time the deferred residual with its norm, forward and backward, against its rivals and a copy (see kernels.py)."""

import kernels
import peers
import pytest
from shapes import CPU_SHAPES, SHAPES

from fastlightgen.ops import gate_residual_norm_modulate
from fastlightgen.ops.gate_residual_norm_modulate import reference

pytestmark = kernels.RECORDED
SIZES = SHAPES if kernels.GPU else CPU_SHAPES
TENSORS = {"forward": 4, "backward": 6}  # reads x, y, writes x', h; reads dh, dx', x', y, writes dx, dy
OPS = gate_residual_norm_modulate, reference.gate_residual_norm_modulate


@pytest.mark.parametrize("name", kernels.CONTENDERS + list(peers.RESIDUAL))
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("shape", SIZES)
def bench_gate_residual_norm_modulate(benchmark, monkeypatch, shape: str, way: str, name: str):
    batch, tokens, dim = SIZES[shape]

    def make():
        tables = {m: kernels.draw(batch, dim, dtype=kernels.torch.float32) for m in ("gate", "scale", "shift")}
        return {v: kernels.draw(batch, tokens, dim) for v in ("x", "y")} | tables

    moved = TENSORS[way] * batch * tokens * dim * kernels.DTYPE.itemsize
    calls = None
    if name != "copy":
        cases = kernels.rotate(make)
        if name in peers.RESIDUAL:
            op, cases = peers.peer(name, cases)
        else:
            op = kernels.contender(monkeypatch, name, *OPS)
        calls = kernels.backward(op, cases) if way == "backward" else [lambda c=c: op(**c) for c in cases]
    kernels.report(benchmark, f"gate_residual_norm_modulate {way} {shape}", name, calls, moved)
