"""Time RMS norm and rotary embedding of q and k, forward and backward, against rivals and a copy (see kernels.py)."""

from functools import partial

import kernels
import pytest
from rivals import real_qk_norm_rope, turns

from fastlightgen.ops import qk_norm_rope, rope_factors
from fastlightgen.ops.qk_norm_rope import reference

pytestmark = kernels.RECORDED
# samples, grid of tokens, text tokens, width, norm per head. In 720p Hunyuan, 129 frames give 33 latent frames.
GPU_SIZES = {
    "wan-14b-480p": (1, (21, 30, 52), 0, 5120, False),
    "wan-14b-720p": (1, (21, 45, 80), 0, 5120, False),
    "wan-1.3b-480p": (1, (21, 30, 52), 0, 1536, False),
    "hunyuan-720p": (1, (33, 45, 80), 256, 3072, True),
}
SIZES = GPU_SIZES if kernels.GPU else {"small (no GPU)": (1, (1, 2, 3), 2, 256, True)}
TENSORS = {"forward": 4, "backward": 6}  # reads q, k, writes both; reads dq, dk, q, k, writes two gradients
HEAD = 128


@pytest.mark.parametrize("name", kernels.CONTENDERS)
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("shape", SIZES)
def bench_qk_norm_rope(benchmark, monkeypatch, shape: str, way: str, name: str):
    batch, grid, text, dim, per_head = SIZES[shape]
    tokens, device = grid[0] * grid[1] * grid[2] + text, kernels.torch.device(kernels.DEVICE)
    rope = rope_factors(grid, (16, 56, 56) if per_head else (44, 42, 42), 256 if per_head else 10000, device)

    def make():
        weights = {w: kernels.draw(HEAD if per_head else dim) for w in ("q_weight", "k_weight")}
        return {v: kernels.draw(batch, tokens, dim) for v in ("q", "k")} | weights

    moved = TENSORS[way] * batch * tokens * dim * kernels.DTYPE.itemsize
    calls = None
    if name != "copy":
        fused, plain = (partial(f, rope=rope, eps=1e-6) for f in (qk_norm_rope, reference.qk_norm_rope))
        if name == "torch.compile":
            cos, sin = turns(rope, tokens)
            plain = partial(real_qk_norm_rope, cos=cos, sin=sin, eps=1e-6)
        op, cases = kernels.contender(monkeypatch, name, fused, plain), kernels.rotate(make)
        calls = kernels.backward(op, cases) if way == "backward" else [lambda c=c: op(**c) for c in cases]
    kernels.report(benchmark, f"qk_norm_rope {way} {shape}", name, calls, moved)
