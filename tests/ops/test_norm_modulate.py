"""norm_modulate: every backend against float64, gradients against finite differences, the registered operator."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops import dispatch, norm_modulate
from fastlightgen.ops.norm_modulate import reference
from fastlightgen.ops.tables import rows, tables

EPS = 1e-6
WIDTHS = [8, 24, 1536, 3072, 5120]  # two odd ones, then Wan 1.3B, HunyuanVideo, Wan 14B
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def exact(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The formula in float64."""
    x, scale, shift = x.double(), scale.double(), shift.double()
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (var + EPS).sqrt() * (1 + scale) + shift


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=gen) + 5  # with this mean a one-pass variance loses digits
    table = torch.randn(shape[0], 6, shape[-1], generator=gen)  # strided rows, as the networks pass them
    return x.to(device, dtype), table[:, 1:2].to(device), table[:, 4:5].to(device)


def allowed(x: Tensor, scale: Tensor, shift: Tensor, want: Tensor) -> float:
    """The allowed error: twice that of torch's kernels in the same dtype, plus one rounding of the largest value."""
    eager = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.to(x.dtype)) + shift.to(x.dtype)
    return 2 * error(eager, want) + torch.finfo(x.dtype).eps * float(want.abs().max()) / 2


def error(got: Tensor, want: Tensor) -> float:
    assert torch.isfinite(got).all(), "a poisoned element was not written"
    return float((got.double() - want).abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", WIDTHS)
def test_reference_matches_float64(dim: int, dtype: torch.dtype):
    x, scale, shift = case((2, 7, dim), dtype)
    want = exact(x, scale, shift)
    got = norm_modulate(x, scale, shift, EPS)
    assert got.dtype == dtype and error(got, want) <= allowed(x, scale, shift, want)


def test_bitwise_as_diffusers_writes_it():
    x, scale, shift = case((2, 7, 96), torch.bfloat16)
    assert torch.equal(
        norm_modulate(x, scale, shift), (F.layer_norm(x.float(), (96,), eps=EPS) * (1 + scale) + shift).type_as(x)
    )


def test_eager_cpu_equals_the_registered_operator():
    x, scale, shift = case((2, 7, 24), torch.float32)
    assert torch.equal(norm_modulate(x, scale, shift), registered(x, scale, shift, EPS))


def test_modulation_shapes():
    """Equal modulations as [B, D], [B, 1, D] and [B, N, D] give equal results; other shapes are refused."""
    x, scale, shift = case((3, 5, 8), torch.float32)
    want = norm_modulate(x, scale, shift)
    assert torch.equal(norm_modulate(x, scale[:, 0], shift[:, 0]), want)
    assert torch.equal(norm_modulate(x, scale.expand_as(x), shift.expand_as(x)), want)
    video = norm_modulate(x.view(3, 5, 1, 8), scale[:, 0], shift[:, 0])
    assert torch.equal(video.view(3, 5, 8), want)
    with pytest.raises(ValueError, match=r"scale got \(2, 8\), wanted \[B, D\].*x \(3, 5, 8\)"):
        norm_modulate(x, scale[:2, 0], shift)


@pytest.mark.parametrize("shape", [(3, 1, 1, 8), (3, 4, 1, 8), (3, 4, 5, 8), (1, 1, 1, 8), (1, 4, 5, 8), (3, 1, 5, 8)])
def test_rows_address_what_broadcasting_means(shape: tuple[int, ...]):
    """Kernels get a table and a count; row r // count must be the row that broadcasting selects."""
    x, mod = torch.zeros(3, 4, 5, 8), torch.randn(shape)
    table, count = rows(mod, x)
    assert torch.equal(table[torch.arange(60) // count], mod.expand_as(x).reshape(60, 8))


def registered(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The registered operator on tables, without the short cut for eager CPU calls."""
    return torch.ops.fastlightgen.norm_modulate(x, *tables("test", x, scale=scale, shift=shift), eps)


def gradients_of(op, x: Tensor, scale: Tensor, shift: Tensor) -> list[Tensor]:
    inputs = [t.detach().clone().requires_grad_() for t in (x, scale, shift)]
    out = op(*inputs, EPS)
    weights = torch.arange(out.numel(), dtype=torch.float64, device=out.device).view_as(out).cos().to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("mod_shape", [(2, 1, 8), (2, 3, 8), (1, 1, 8)])
def test_gradient_matches_finite_differences(mod_shape: tuple[int, ...]):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, generator=gen, dtype=torch.float64, requires_grad=True)
    scale, shift = (torch.randn(mod_shape, generator=gen, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for op in (registered, norm_modulate):
        assert torch.autograd.gradcheck(lambda *a, op=op: op(*a, EPS), (x, scale, shift))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_operator_matches_autograd_in_float64(dtype: torch.dtype):
    x, scale, shift = case((2, 7, 1536), dtype)
    got = gradients_of(registered, x, scale, shift)
    want = gradients_of(norm_modulate, x.double(), scale.double(), shift.double())
    # The weights are rounded to dtype, and so is dx; the sums of 7 terms stay in float32.
    for g, w in zip(got, want):
        assert error(g, w) <= 2 * torch.finfo(dtype).eps * float(w.abs().max()) + 1e-6
    again = gradients_of(registered, x, scale, shift)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_opcheck():
    x, scale, shift = case((2, 3, 8), torch.float32)
    inputs = (x.requires_grad_(), *(m[:, 0].clone().requires_grad_() for m in (scale, shift)), EPS)
    torch.library.opcheck(torch.ops.fastlightgen.norm_modulate.default, inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_operator_and_its_gradient():
    x, scale, shift = case((3, 33, 1536), torch.float32, "cuda")
    want = exact(x, scale, shift)
    assert error(norm_modulate(x, scale, shift), want) <= allowed(x, scale, shift, want)
    got = gradients_of(norm_modulate, x, scale, shift)
    # Sums of 33 float32 terms, and rstd over 1536: a few roundings of the largest value.
    for g, w in zip(got, gradients_of(reference.norm_modulate, x.double(), scale.double(), shift.double())):
        assert error(g, w) <= 16 * torch.finfo(torch.float32).eps * float(w.abs().max())


def test_flg_ops(monkeypatch: pytest.MonkeyPatch):
    """A named backend must be available; `auto` and `reference` always are."""

    def choose(name: str) -> str:
        monkeypatch.setenv("FLG_OPS", name)
        return dispatch.backend.__wrapped__()

    assert choose("reference") == "reference" and choose("auto") in dispatch.BACKENDS
    with pytest.raises(ValueError, match="FLG_OPS: got 'cudnn', wanted one of auto, cuda, triton, reference"):
        choose("cudnn")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "triton"):
        with pytest.raises(ValueError, match=f"got '{name}', which is not available: no CUDA device.*set FLG_OPS=auto"):
            choose(name)
