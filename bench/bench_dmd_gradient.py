"""Time dmd_gradient against its rivals and against a copy of the bytes that it must move at least (see kernels.py)."""

import kernels
import pytest

from fastlightgen.ops import dmd_gradient
from fastlightgen.ops.dmd_gradient import reference

pytestmark = kernels.RECORDED
GPU_SIZES = {"wan-480p": (1, 16, 21, 60, 104), "wan-720p": (1, 16, 21, 90, 160)}
SIZES = GPU_SIZES if kernels.GPU else {"small (no GPU)": (2, 16, 1, 8, 8)}
NAMES = ("x0", "x_t", "v_fake", "v_weak_cond", "v_weak_null", "v_strong_cond")


@pytest.mark.parametrize("name", kernels.CONTENDERS)
@pytest.mark.parametrize("shape", SIZES)
def bench_dmd_gradient(benchmark, monkeypatch, shape: str, name: str):
    size = SIZES[shape]
    scalars = {s: kernels.torch.full(size[:1], 0.5, device=kernels.DEVICE) for s in ("t", "beta1", "beta2")}

    def make():
        return {n: kernels.draw(*size) for n in NAMES} | scalars

    moved = 7 * kernels.torch.Size(size).numel() * kernels.DTYPE.itemsize  # six tensors read, one written
    calls = None
    if name != "copy":
        op, cases = kernels.contender(monkeypatch, name, dmd_gradient, reference.dmd_gradient), kernels.rotate(make)
        calls = [lambda c=c: op(**c) for c in cases]
    kernels.report(benchmark, f"dmd_gradient {shape}", name, calls, moved)
