"""The deferred residual and its norm: the CUDA sources on this CPU, the reference and the GPU against float64."""

import itertools

import pytest
import rule
import simt as shim
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops import dispatch, gate_residual_norm_modulate, norm_modulate

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTHS = [8, 1000, 1536, 3072, 4096, 5120]  # Wan 1.3B, HunyuanVideo, Wan 14B, and others with idle threads
VARIANTS = ["plain", "gated", "ungated", "affine", "affine ungated", "frames"]


def formula(x, y=None, gate=None, scale=None, shift=None, weight=None, bias=None):
    """The formula with torch's operations, in the dtype of the inputs."""
    to = x.dtype

    def rows(mod: Tensor) -> Tensor:
        return (mod[:, None] if mod.dim() == 2 else mod).to(to)

    if y is not None:
        x = x + (y if gate is None else rows(gate) * y)
    if scale is None:
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    h = F.layer_norm(x, x.shape[-1:], None, None, EPS) * (1 + rows(scale)) + rows(shift)
    return h if y is None else (x, h)


def op(x, y=None, gate=None, scale=None, shift=None, weight=None, bias=None):
    if y is None:
        return norm_modulate(x, scale, shift, EPS)
    return gate_residual_norm_modulate(x, y, gate, scale, shift, EPS, weight, bias)


def case(variant: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> dict:
    gen = torch.Generator().manual_seed(sum(shape))
    batch, _, dim = shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen).bfloat16().float().to(device)  # exact in bfloat16, and nearly in half

    found = {"x": (draw(*shape) + 5).to(dtype)}  # with this mean a one-pass variance loses digits
    if variant != "plain":
        found["y"] = draw(*shape).to(dtype)
    if variant in ("gated", "affine", "frames"):
        found["gate"] = draw(batch, dim)
    if variant.startswith("affine"):
        return found | {"weight": draw(dim).to(dtype), "bias": draw(dim).to(dtype)}
    rows = shape[:2] if variant == "frames" else shape[:1]  # modulation per frame, gate per sample
    return found | {"scale": draw(*rows, dim), "shift": draw(*rows, dim)}


def agrees(variant: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> None:
    inputs = case(variant, shape, dtype, device)
    exact, own = rule.results(formula, inputs, torch.float64), rule.results(formula, inputs)
    got = rule.results(op, inputs)
    terms = shape[0] * shape[1] if "weight" in inputs else shape[1]
    rule.check(got, own, exact, terms)
    assert rule.same(got, rule.results(op, inputs)), "not the same bits twice"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dim", [8, 1000])
def test_cuda_sources(simt, variant: str, dim: int, dtype: torch.dtype):
    agrees(variant, (2, 11, dim), dtype)


@pytest.mark.parametrize(
    ("dim", "dtype"), [(1536, torch.bfloat16), (3072, torch.float16), (5120, torch.bfloat16), (5120, torch.float32),
                       (4096, torch.bfloat16)], ids=str
)  # fmt: skip
def test_cuda_sources_at_real_widths(simt, dim: int, dtype: torch.dtype):
    agrees("gated", (2, 9, dim), dtype)
    agrees("plain", (1, 5, dim), dtype)


def test_no_barrier_is_missing(simt):
    """Running threads and blocks in the opposite order gives the same bits: no thread reads unwritten data."""
    inputs = case("gated", (3, 13, 1536), torch.bfloat16)
    want = rule.results(op, inputs)
    shim.backwards(True)
    try:
        assert rule.same(rule.results(op, inputs), want)
    finally:
        shim.backwards(False)


def test_a_run_never_crosses_a_modulation_row(simt):
    """From one row per group to more rows than blocks, each row reads its own table row."""
    for batch, rows in ((1, 1), (1, 40), (37, 1), (5, 7)):
        agrees("gated", (batch, rows, 64), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_on_tables(monkeypatch, variant: str, dtype: torch.dtype):
    """The registered operator on CPU tensors, with its explicit gradient."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # skips the short cut for eager CPU calls
    agrees(variant, (2, 7, 48), dtype)


def test_eager_equals_the_registered_operator(monkeypatch):
    inputs = case("gated", (2, 7, 48), torch.bfloat16)
    want = op(**inputs)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(op(**inputs), want, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_and_compile(variant: str):
    inputs = rule.leaves(case(variant, (2, 3, 8), torch.float32))
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    want, got = rule.results(op, inputs), rule.results(compiled, inputs)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
    if variant in ("gated", "ungated"):
        gate = inputs.get("gate")
        args = (inputs["x"], inputs["y"], gate, inputs["scale"], inputs["shift"], False, EPS)
        torch.library.opcheck(torch.ops.fastlightgen.gate_residual_norm_modulate.default, args)


def test_bad_input_is_named():
    x, mod = torch.randn(2, 3, 8), torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"y got \(2, 2, 8\) torch.float32, wanted x's \(2, 3, 8\)"):
        gate_residual_norm_modulate(x, x[:, :2], mod, mod, mod)
    with pytest.raises(ValueError, match=r"gate got \(3, 8\), wanted \[B, D\]"):
        gate_residual_norm_modulate(x, x, torch.randn(3, 8), mod, mod)
    with pytest.raises(ValueError, match="scale and shift come together"):
        gate_residual_norm_modulate(x, x, mod, mod)


def test_launch_error_is_words(simt):
    x = torch.randn(2, 16)
    with pytest.raises(RuntimeError, match=r"some_op: cudaError 1, .+, for \(2, 16\) torch.float32; set FLG_OPS"):
        dispatch.check("some_op", 1, x)


def gpu_cases() -> list[tuple]:
    """Triton compiles two kernels per case, which takes long: only two variants in bfloat16 at the real widths."""
    every = itertools.product(["cuda", "triton"], WIDTHS, VARIANTS, DTYPES)
    some = [(variant, torch.bfloat16) for variant in ("plain", "gated")]
    return [c for c in every if c[0] == "cuda" or c[1] <= 1000 or c[2:] in some]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("backend", "dim", "variant", "dtype"), gpu_cases(), ids=str)
def test_gpu(monkeypatch, backend: str, dim: int, variant: str, dtype: torch.dtype):
    if reason := dispatch._why_not(backend):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: backend)
    agrees(variant, (3, 331, dim), dtype, "cuda")
