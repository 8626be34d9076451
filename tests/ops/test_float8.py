"""Float8 linear layers: scales and rounding, the emulated product, the arguments of torch's scaled product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlightgen.ops import float8

M, K, N = 5, 32, 48


def draw(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers() -> Tensor:
    """All numbers of e4m3 from its definition: 4 bits of exponent with a bias of 7, 3 of mantissa, no infinity."""
    found = [2.0**-6 * m / 8 for m in range(8)]
    found += [2.0 ** (e - 7) * (1 + m / 8) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
    return torch.tensor(sorted({s * v for v in found for s in (1, -1)}), dtype=torch.float64)


@pytest.mark.parametrize("slab", [float8.SLAB, 7 * 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_scaled_to_448_and_rounded_to_the_nearest_number(dtype, slab, monkeypatch):
    monkeypatch.setattr(float8, "SLAB", slab)
    x = draw(64, 96, dtype=dtype) * torch.logspace(-6, 6, 64)[:, None].to(dtype)
    q, scale = float8.quantised(x)
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (64, 1)
    exact = x.double().abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(scale.double(), exact, rtol=1e-7, atol=0)
    wanted, got = x.double() / exact, q.double()
    nearest = (wanted[..., None] - numbers()).abs().amin(-1)
    assert bool(((got - wanted).abs() <= nearest + 1e-6 * wanted.abs()).all())
    assert bool((got.abs().amax(1) == 448).all())


def test_a_row_of_zeros_stays_zero_and_a_nan_stays():
    x = draw(3, K)
    x[0], x[1, 4] = 0, torch.nan
    q, scale = float8.quantised(x)
    assert q[0].float().eq(0).all() and scale.isfinite()[[0, 2]].all()
    w, w_scale = float8.quantised(draw(N, K, seed=1))
    y = float8.linear(x, w, w_scale, None, torch.float32)
    assert y[0].eq(0).all() and y[1].isnan().all() and y[2].isfinite().all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulation_against_a_loop(dtype, biased):
    x, w, b = draw(1, M, K, dtype=dtype), draw(N, K, seed=1), draw(N, seed=2)
    (q, s), (qw, sw) = float8.quantised(x[0]), float8.quantised(w)
    y = float8.linear(x, qw, sw, b if biased else None, dtype)
    assert y.dtype == dtype and y.shape == (1, M, N)
    rounded = b.to(dtype)
    for m in range(M):
        for n in range(N):
            total = sum(float(q[m, k]) * float(qw[n, k]) for k in range(K))
            want = total * float(s[m]) * float(sw[n]) + float(rounded[n]) * biased
            size = sum(abs(float(q[m, k]) * float(qw[n, k])) for k in range(K)) * float(s[m]) * float(sw[n])
            error = abs(float(y[0, m, n]) - want)
            assert error <= torch.finfo(dtype).eps / 2 * abs(want) + 4e-7 * size + 1e-7 * abs(float(b[n]))


def test_the_error_is_that_of_three_bits():
    """A relative rounding error is at most 1/16 per factor and about 0.026 in the mean square, of independent sign."""
    x, w = draw(64, 512), draw(256, 512, seed=1)
    y = float8.linear(x, *float8.quantised(w), None, torch.float32)
    exact = x.double() @ w.double().mT
    assert 0.02 < float((y - exact).norm() / exact.norm()) < 0.06


def test_autocast_decides_nothing_inside():
    x, w = draw(M, K), float8.quantised(draw(N, K, seed=1))
    with torch.autocast("cpu", torch.bfloat16):
        y = float8.linear(x, *w, None, torch.float32)
    assert torch.equal(y, float8.linear(x, *w, None, torch.float32))


@pytest.fixture
def calls(monkeypatch) -> list:
    """The arguments of torch's scaled product."""
    seen: list = []
    own = F.scaled_mm

    def noted(*args, **keys):
        seen.append((args, keys))
        return own(*args, **keys)

    monkeypatch.setattr(F, "scaled_mm", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_scaled_product_gives_the_emulations_numbers(calls, dtype):
    """On a CPU torch has a scaled product of its own."""
    (q, s), (w, sw), b = float8.quantised(draw(M, K)), float8.quantised(draw(N, K, seed=1)), draw(N, seed=2)
    y = float8.scaled_product(q, s, w, sw, b, dtype)
    want = float8.emulated(q, s, w, sw, b, torch.bfloat16).to(dtype)  # with a bias it returns 16 bits
    assert y.dtype == dtype
    torch.testing.assert_close(y, want, rtol=2**-7, atol=1e-6)  # sums in another order may round to the neighbour
    ((a, second, a_scale, _, b_scale, _), keys) = calls[0]
    assert a.stride() == (K, 1) and second.shape == (K, N) and second.stride() == (1, K)
    assert a_scale.shape == (M, 1) and b_scale.shape == (1, N) and a_scale.is_contiguous() and b_scale.is_contiguous()
    assert a_scale.dtype == b_scale.dtype == torch.float32 and keys["bias"].dtype == keys["output_dtype"]
    assert keys["output_dtype"] == torch.bfloat16


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_gpu_takes_torchs_product_and_a_cpu_the_emulation(calls, device):
    """Fake tensors stand for a GPU's: torch checks their layouts as it does on a GPU."""
    with FakeTensorMode():
        x, b = torch.empty(2, M, K, device=device, dtype=torch.bfloat16), torch.empty(N, device=device)
        w = float8.quantised(torch.empty(N, K, device=device))
        y = float8.linear(x, *w, b, torch.bfloat16)
    assert y.shape == (2, M, N) and y.dtype == torch.bfloat16 and y.device.type == device
    assert len(calls) == (device == "cuda")


@pytest.mark.parametrize(
    "capability, dtype, hip, why",
    [
        ((8, 0), torch.bfloat16, None, "this GPU is sm_80; float8 products begin with sm_89"),
        ((8, 9), torch.bfloat16, None, ""),
        ((9, 0), torch.bfloat16, None, ""),
        ((12, 0), torch.bfloat16, None, ""),
        ((9, 0), torch.float32, None, "on a GPU it needs dtype=bfloat16"),
        ((9, 4), torch.bfloat16, "7.0", "AMD's GPUs have another float8 format"),
    ],
)
def test_which_gpus_can(monkeypatch, capability, dtype, hip, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert float8.refusal(torch.device("cuda"), dtype) == why
    assert float8.refusal(torch.device("cpu"), torch.float32) == ""
