"""Time the attention kernels, the choices of FLG_ATTENTION, at the networks' shapes, forward and backward.

`TFLOP/s` counts the products: two forward, five backward (the backward computes the logits again).
"""

import kernels
import pytest
import torch
from device_time import sampled
from kernels import GPU, draw

from fastlightgen.ops import attend, attention

pytestmark = kernels.RECORDED

# clips, tokens, heads, channels of a head
SIZES = {"wan-14b-480p": (1, 32760, 40, 128), "wan-1.3b-480p": (1, 32760, 12, 128)}
SIZES = SIZES if GPU else {"the built-in world (no GPU)": (16, 200, 4, 32)}
PRODUCTS = "matrix products"  # attention_cpu.py


@pytest.mark.parametrize("name", [*(n for n in attention.KERNELS if not (GPU and n == "math")), PRODUCTS])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("shape", SIZES)
def bench_attention(benchmark, monkeypatch, shape: str, way: str, name: str):
    clips, tokens, heads, channels = SIZES[shape]
    if reason := "it is for a CPU" * GPU if name == PRODUCTS else attention._why_not(name):
        pytest.skip(reason)
    kernels_tried = None if name == PRODUCTS else [attention.KERNELS[name]]
    monkeypatch.setattr(attention, "_kernels", lambda on_gpu, masked: kernels_tried)
    try:
        cases = [{n: draw(clips, tokens, heads, channels, dtype=torch.bfloat16) for n in "qkv"}]
        calls = kernels.backward(attend, cases) if way == "backward" else [lambda: attend(**cases[0])]
        samples = sampled(calls, 10 if GPU else 3)
    finally:
        if name in attention.NEWER:
            attention.switch.restore_flash_attention_impl()
    flops = (10 if way == "backward" else 4) * clips * tokens**2 * heads * channels
    speed = {"TFLOP/s": flops / samples.median / 1e12}
    kernels.record(benchmark, f"attention {way} {shape}", name, samples, torch.bfloat16, **speed)
