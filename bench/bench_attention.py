"""Time torch's attention kernels, the choices of FLG_ATTENTION, at the networks' shapes, forward and backward.

`TFLOP/s` counts the products: two forward, five backward (the backward computes the logits again).
"""

import kernels
import pytest
from device_time import sampled
from kernels import GPU, draw

from fastlightgen.ops import attend, attention

pytestmark = kernels.RECORDED

# tokens, heads of 128 channels
SIZES = {"wan-14b-480p": (32760, 40), "wan-1.3b-480p": (32760, 12)} if GPU else {"small (no GPU)": (96, 2)}


@pytest.mark.parametrize("name", [name for name in attention.KERNELS if not (GPU and name == "math")])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("shape", SIZES)
def bench_attention(benchmark, monkeypatch, shape: str, way: str, name: str):
    tokens, heads = SIZES[shape]
    if reason := attention._why_not(name):
        pytest.skip(reason)
    monkeypatch.setattr(attention, "_kernels", lambda on_gpu, masked: [attention.KERNELS[name]])
    try:
        cases = [{n: draw(1, tokens, heads, 128) for n in "qkv"}]
        calls = kernels.backward(attend, cases) if way == "backward" else [lambda: attend(**cases[0])]
        samples = sampled(calls, 10 if GPU else 3)
    finally:
        if name in attention.NEWER:
            attention.switch.restore_flash_attention_impl()
    flops = (10 if way == "backward" else 4) * tokens**2 * heads * 128
    speed = {"TFLOP/s": flops / samples.median / 1e12}
    kernels.record(benchmark, f"attention {way} {shape}", name, samples, **speed)
