"""dmd_gradient against Eq. 8 and 9 written out in NumPy float64, and against Gaussians with a known answer."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlightgen.ops import dispatch, dmd_gradient
from fastlightgen.ops.dmd_gradient import reference

B = 3
NAMES = ("x0", "x_t", "v_fake", "v_weak_cond", "v_weak_null", "v_strong_cond")
BETAS = {
    "numbers": (3.5, 0.25),
    "per sample": (torch.tensor([2.5, 3.5, 4.5]), torch.tensor([0.15, 0.25, 0.35])),
    "mixed": (2.0, torch.tensor([0.15, 0.25, 0.35])),
    "scalar tensors": (torch.tensor(3.5), torch.tensor(0.25)),
}
SHAPES = [(B, 4, 2, 3, 5), (B, 7), (B, 1)]


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    gen = torch.Generator().manual_seed(len(shape))
    tensors = {name: torch.randn(shape, generator=gen).to(dtype) for name in NAMES}
    return tensors, torch.tensor([0.05, 0.5, 0.97])


def by_hand(tensors: dict[str, Tensor], t: Tensor, beta1, beta2) -> tuple[np.ndarray, np.ndarray]:
    """The formula in NumPy float64, sample by sample."""
    x0, x_t, fake, weak, null, strong = (tensors[name].double().numpy() for name in NAMES)
    grads, norms = [], []
    for i in range(len(x0)):
        ti, b1, b2 = (float(v[i]) if getattr(v, "ndim", 0) else float(v) for v in (t, beta1, beta2))
        real = b1 * (weak[i] - null[i]) + b2 * (strong[i] - weak[i]) + null[i]
        x0_real, x0_fake = x_t[i] - ti * real, x_t[i] - ti * fake[i]
        norms.append(np.abs(x0[i] - x0_real).mean() + 1e-6)
        grads.append((x0_fake - x0_real) / norms[-1])
    return np.stack(grads), np.array(norms)


def same_dtype(tensors: dict[str, Tensor], t: Tensor, beta1: float, beta2: float) -> Tensor:
    """The formula with torch in the dtype of the inputs, for the error rule."""
    x0, x_t, fake, weak, null, strong = (tensors[name] for name in NAMES)
    t = t.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))
    x0_real = x_t - t * (beta1 * (weak - null) + beta2 * (strong - weak) + null)
    norm = (x0 - x0_real).abs().flatten(1).mean(1) + 1e-6
    return (x_t - t * fake - x0_real) / norm.view(t.shape)


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_by_hand(shape, betas):
    tensors, t = case(shape, torch.float64)
    grad, normaliser = dmd_gradient(**tensors, t=t.double(), beta1=betas[0], beta2=betas[1])
    want, norm = by_hand(tensors, t.double(), *betas)
    assert grad.shape == shape and normaliser.shape == (B,) and grad.dtype == normaliser.dtype == torch.float64
    np.testing.assert_allclose(grad.numpy(), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normaliser.numpy(), norm, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_low_precision_is_within_twice_torchs_own_error(shape, dtype):
    tensors, t = case(shape, dtype)
    grad, normaliser = dmd_gradient(**tensors, t=t, beta1=3.5, beta2=0.25)
    want, norm = by_hand(tensors, t, 3.5, 0.25)
    assert grad.dtype == dtype and normaliser.dtype == torch.float32
    yardstick = np.abs(same_dtype(tensors, t, 3.5, 0.25).double().numpy() - want).max()
    rounding = torch.finfo(dtype).eps / 2 * np.abs(want).max()
    assert np.abs(grad.double().numpy() - want).max() <= 2 * yardstick + rounding
    # float32 inside for all input types: a few roundings of terms up to 3.5 times larger than the mean.
    np.testing.assert_allclose(normaliser.numpy(), norm, rtol=20 * torch.finfo(torch.float32).eps)


def test_predictions_in_bf16_for_a_float32_student():
    tensors, t = case(SHAPES[0], torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in ("x0", "x_t")}
    grad, _ = dmd_gradient(**tensors, t=t, beta1=3.5, beta2=0.25)
    assert grad.dtype == torch.float32
    np.testing.assert_allclose(grad.numpy(), by_hand(tensors, t, 3.5, 0.25)[0], rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_samples():
    tensors, t = case(SHAPES[0], torch.float32)
    beta1, beta2 = BETAS["per sample"]
    grad, normaliser = dmd_gradient(**tensors, t=t, beta1=beta1, beta2=beta2)
    for i in range(B):
        one = slice(i, i + 1)
        alone = dmd_gradient(**{k: v[one] for k, v in tensors.items()}, t=t[one], beta1=beta1[one], beta2=beta2[one])
        assert torch.equal(grad[one], alone[0]) and torch.equal(normaliser[one], alone[1])


def test_before_the_normaliser_it_is_t_times_the_velocity_difference():
    tensors, t = case(SHAPES[0], torch.float64)
    grad, normaliser = dmd_gradient(**tensors, t=t.double(), beta1=1.0, beta2=1.0)  # v_real = v_strong_cond
    at, norm = (v.view(-1, 1, 1, 1, 1) for v in (t.double(), normaliser))
    torch.testing.assert_close(grad * norm, at * (tensors["v_strong_cond"] - tensors["v_fake"]))


@pytest.mark.parametrize(("t", "step"), [(0.5, 1.0), (0.25, 0.2), (1.0, 2.0)])
def test_gaussian_generator_moves_towards_the_data(t: float, step: float):
    """Data N(0, 1), generator N(2, 1): x0_fake - x0_real = 2 t^2 / (t^2 + (1 - t)^2) everywhere, +1.000 at t = 1/2."""
    x0 = 2 + torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = (1 - t) * x0 + t * torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def best_v(m: float) -> Tensor:  # (x_t - E[x0 | x_t]) / t for data N(m, 1)
        return (x_t - m - (1 - t) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * m)) / t

    real, times = best_v(0.0), torch.full((64,), t, dtype=torch.float64)
    grad, normaliser = dmd_gradient(x0, x_t, times, best_v(2.0), real, real, real, 3.5, 0.25)
    torch.testing.assert_close(grad * normaliser[:, None], torch.full_like(grad, step))  # descent lowers the mean


def test_no_difference_no_gradient():
    tensors, t = case(SHAPES[0], torch.float32)
    v = tensors["v_fake"]
    x_t = tensors["x_t"]
    grad, normaliser = dmd_gradient(x_t - t.view(-1, 1, 1, 1, 1) * v, x_t, t, v, v, v, v, 3.5, 0.25)
    assert torch.equal(grad, torch.zeros_like(grad))
    torch.testing.assert_close(normaliser, torch.full((B,), 1e-6))  # x0 is x0_real: only the 1e-6 remains


TYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)]


def check_kernel(dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...], device: str) -> None:
    """Compare the current backend with float64, and two runs with each other bit for bit."""
    tensors, t = case(shape, dtypes[1])
    tensors |= {name: tensors[name].to(dtypes[0]) for name in ("x0", "x_t")}
    there = {name: v.to(device) for name, v in tensors.items()}
    beta1, beta2 = (b.to(device) for b in BETAS["per sample"])
    grad, normaliser = dmd_gradient(**there, t=t.to(device), beta1=beta1, beta2=beta2)
    again, _ = dmd_gradient(**there, t=t.to(device), beta1=beta1, beta2=beta2)
    assert torch.equal(grad, again)
    want, norm = by_hand(tensors, t, *BETAS["per sample"])
    own, _ = reference.dmd_gradient(**tensors, t=t, beta1=BETAS["per sample"][0], beta2=BETAS["per sample"][1])
    yardstick = np.abs(own.double().numpy() - want).max()
    rounding = (torch.finfo(dtypes[0]).eps / 2 + 8 * torch.finfo(torch.float32).eps) * np.abs(want).max()
    assert grad.dtype == dtypes[0] and np.abs(grad.double().cpu().numpy() - want).max() <= 2 * yardstick + rounding
    np.testing.assert_allclose(normaliser.cpu().numpy(), norm, rtol=20 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtypes", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(B, 4, 2, 3, 8), (B, 16, 5, 24, 32), (B, 8)], ids=str)
def test_cuda_sources(simt, shape, dtypes):
    """Samples with one vector per thread, with many, and with fewer vectors than threads."""
    check_kernel(dtypes, shape, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtypes", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(B, 8), (B, 16, 21, 60, 104)], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu(monkeypatch, backend, shape, dtypes):
    if reason := dispatch._why_not(backend):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: backend)
    check_kernel(dtypes, shape, "cuda")


def test_opcheck_and_compile():
    tensors, t = case((B, 2, 8), torch.float32)
    betas = [b.float() for b in BETAS["per sample"]]
    order = ("x0", "x_t", "t", "v_fake", "v_weak_cond", "v_weak_null", "v_strong_cond")
    args = [(tensors | {"t": t})[name] for name in order] + betas
    torch.library.opcheck(torch.ops.fastlightgen.dmd_gradient.default, args)
    torch._dynamo.reset()
    compiled = torch.compile(dmd_gradient, backend="aot_eager", fullgraph=True)
    for betas in ((3.5, 0.25), BETAS["per sample"]):
        want, got = (f(**tensors, t=t, beta1=betas[0], beta2=betas[1]) for f in (dmd_gradient, compiled))
        assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


def test_shapes_that_differ_are_named():
    tensors, t = case((B, 8), torch.float32)
    with pytest.raises(ValueError, match=r"v_fake got \(3, 1\) on cpu, wanted x0's \(3, 8\) on cpu"):
        dmd_gradient(**tensors | {"v_fake": torch.zeros(B, 1)}, t=t, beta1=1.0, beta2=1.0)
