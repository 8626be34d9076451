"""Time linear layers with a fused epilogue against torch's product and separate operations, forward and backward.

`TFLOP/s` counts the products: one forward, two backward. The gate's gradient needs no product of its own.
"""

import kernels
import pytest
from device_time import sampled
from kernels import GPU, draw

from fastlightgen.ops import dispatch, gemm, linear_gate_residual, linear_gelu_tanh
from fastlightgen.ops.linear_gate_residual import reference as residual
from fastlightgen.ops.linear_gelu_tanh import reference as gelu

pytestmark = kernels.RECORDED
# rows, K, N of the two layers of a feed-forward and of an attention's output layer
GPU_SIZES = {
    "linear_gelu_tanh": {"wan-14b-480p": (32760, 5120, 13824), "wan-1.3b-480p": (32760, 1536, 8960)},
    "linear_gate_residual": {"wan-14b-480p ffn": (32760, 13824, 5120), "wan-14b-480p attention": (32760, 5120, 5120)},
}
SIZES = GPU_SIZES if GPU else {op: {"small (no GPU)": (96, 64, 128)} for op in GPU_SIZES}
OPS = {
    "linear_gelu_tanh": (linear_gelu_tanh, gelu.linear_gelu_tanh),
    "linear_gate_residual": (linear_gate_residual, residual.linear_gate_residual),
}


@pytest.mark.parametrize("name", ["cuda", "eager", "torch.compile"])
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op, shapes in SIZES.items() for shape in shapes])
def bench_linear(benchmark, monkeypatch, op: str, shape: str, way: str, name: str):
    if name == "cuda" and not (dispatch.gemm_built() and kernels.torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip(f"CUTLASS products: {dispatch.parts()['CUTLASS products'][1]}; they are for sm_90a")
    monkeypatch.setattr(gemm, "faster", lambda *_: True)  # time the kernels, whatever the table says of them
    rows, inner, dim = SIZES[op][shape]

    def make():
        case = {"x": draw(1, rows, inner), "weight": draw(dim, inner) / inner**0.5, "bias": draw(dim)}
        return case if op == "linear_gelu_tanh" else case | {"c": draw(1, rows, dim), "gate": draw(1, dim)}

    run, cases = kernels.contender(monkeypatch, name, *OPS[op]), kernels.rotate(make)
    calls = kernels.backward(run, cases) if way == "backward" else [lambda c=c: run(**c) for c in cases]
    samples = sampled(calls, kernels.ROUNDS)
    flops = (4 if way == "backward" else 2) * rows * inner * dim
    kernels.record(benchmark, f"{op} {way} {shape}", name, samples, **{"TFLOP/s": flops / samples.median / 1e12})
