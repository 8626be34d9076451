"""Time norm_modulate, forward and backward, against its rivals and a copy of the same bytes (see kernels.py)."""

import kernels
import peers
import pytest
from shapes import CPU_SHAPES, SHAPES

from fastlightgen.ops import norm_modulate
from fastlightgen.ops.norm_modulate import reference

pytestmark = kernels.RECORDED
SIZES = SHAPES if kernels.GPU else CPU_SHAPES
TENSORS = {"forward": 2, "backward": 3}  # reads x, writes h; reads dh, x, writes dx. Tables: 1/tokens of that


def plain(x, scale, shift):
    return reference.norm_modulate(x, scale, shift, 1e-6)


@pytest.mark.parametrize("name", kernels.CONTENDERS + list(peers.NORM))
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("shape", SIZES)
def bench_norm_modulate(benchmark, monkeypatch, shape: str, way: str, name: str):
    batch, tokens, dim = SIZES[shape]

    def make():
        mods = {m: kernels.draw(batch, 1, dim, dtype=kernels.torch.float32) for m in ("scale", "shift")}
        return {"x": kernels.draw(batch, tokens, dim)} | mods

    moved = TENSORS[way] * batch * tokens * dim * kernels.DTYPE.itemsize
    calls = None
    if name != "copy":
        cases = kernels.rotate(make)
        if name in peers.NORM:
            op, cases = peers.peer(name, cases)
        else:
            op = kernels.contender(monkeypatch, name, norm_modulate, plain)
        calls = kernels.backward(op, cases) if way == "backward" else [lambda c=c: op(**c) for c in cases]
    kernels.report(benchmark, f"norm_modulate {way} {shape}", name, calls, moved)
