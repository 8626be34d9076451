"""The distribution-matching gradient of Stage III: Eq. 8 under the well-guided teacher of Eq. 9."""

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.dmd_gradient import reference
from fastlightgen.ops.tables import DTYPES, check_together, dense

__all__ = ["dmd_gradient"]


def dmd_gradient(
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    v_fake: Tensor,
    v_weak_cond: Tensor,
    v_weak_null: Tensor,
    v_strong_cond: Tensor,
    beta1: Tensor | float,
    beta2: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Eq. 8 with sigma_t = t: return grad = (x0_fake - x0_real) / normaliser, shaped like x0, and normaliser [B].

    The student descends along grad. t is [B], beta1 and beta2 are numbers or [B], all other tensors [B, ...]. With
    x0_* = x_t - t v_*, the difference equals t (v_real - v_fake); normaliser[b] = mean |x0 - x0_real| + 1e-6 (DMD2).
    Kernels give no gradient of the results; if one is needed, the reference computes them.
    """
    tensors = (x0, x_t, v_fake, v_weak_cond, v_weak_null, v_strong_cond)
    shape, device, tracked = x0.shape, x0.device, x0.requires_grad
    for at, tensor in enumerate(tensors):
        tracked |= tensor.requires_grad
        if tensor.shape != shape or tensor.device != device:
            name = ("x0", "x_t", "v_fake", "v_weak_cond", "v_weak_null", "v_strong_cond")[at]
            got, wanted = (f"{tuple(v.shape)} on {v.device}" for v in (tensor, x0))
            raise ValueError(f"dmd_gradient: {name} got {got}, wanted x0's {wanted}; make them equal")
    check_together("dmd_gradient", x0)
    if not x0.numel() and shape[0]:
        raise ValueError(
            f"dmd_gradient: x0 got {tuple(x0.shape)}, wanted samples with elements; their mean is undefined"
        )
    # The reference costs no dispatch; it is also the only code that autograd can follow.
    eager = not torch.compiler.is_compiling() and dispatch.backend_for(device.type) == "reference"
    if eager or (tracked and torch.is_grad_enabled()):
        return reference.dmd_gradient(x0, x_t, t, v_fake, v_weak_cond, v_weak_null, v_strong_cond, beta1, beta2)
    t, beta1, beta2 = _per_sample(t, x0), _per_sample(beta1, x0), _per_sample(beta2, x0)
    return _call(x0, x_t, t, v_fake, v_weak_cond, v_weak_null, v_strong_cond, beta1, beta2)


def _per_sample(value: Tensor | float, x0: Tensor) -> Tensor:
    """A number or tensor as [B] in float32 (float64 for a float64 x0) on x0's device."""
    wide = torch.float64 if x0.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor) and value.shape == x0.shape[:1] and value.dtype == wide and value.device == x0.device:
        return value
    return torch.as_tensor(value, dtype=wide, device=x0.device).expand(len(x0))


def _compute(
    x0: Tensor, x_t: Tensor, t: Tensor, v_fake: Tensor, v_weak_cond: Tensor, v_weak_null: Tensor,
    v_strong_cond: Tensor, beta1: Tensor, beta2: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a kernel, or the reference where kernels do not apply (float64, samples of no multiple of 8 elements)."""
    backend = dispatch.backend_for(x0.device.type)
    v = [v_fake, v_weak_cond, v_weak_null, v_strong_cond]
    kind, kind_v, samples = x0.dtype, v_fake.dtype, x0.shape[0]
    same = v_weak_cond.dtype == v_weak_null.dtype == v_strong_cond.dtype == kind_v and x_t.dtype == kind
    takes = same and kind in (kind_v, torch.float32) and kind in DTYPES and kind_v in DTYPES
    takes = takes and x0.numel() > 0 and x0.numel() % (8 * samples) == 0
    if backend == "reference" or not takes:
        grad, normaliser = reference.dmd_gradient(x0, x_t, t, v[0], v[1], v[2], v[3], beta1, beta2)
        return grad.contiguous(), normaliser
    grad = torch.empty_like(x0, memory_format=torch.contiguous_format)
    normaliser = t.new_empty(samples)
    kernels = dispatch.kernels("dmd_gradient", backend)
    scalars = [t.contiguous(), beta1.contiguous(), beta2.contiguous()]
    kernels.forward(grad, normaliser, [dense(x0), dense(x_t)], [dense(p) for p in v], scalars)
    return grad, normaliser


def _fake(x0, x_t, t, v_fake, v_weak_cond, v_weak_null, v_strong_cond, beta1, beta2):
    return x0.new_empty(x0.shape), t.new_empty(len(x0))


_call = dispatch.register(
    "dmd_gradient(Tensor x0, Tensor x_t, Tensor t, Tensor v_fake, Tensor v_weak_cond, Tensor v_weak_null, "
    "Tensor v_strong_cond, Tensor beta1, Tensor beta2) -> (Tensor, Tensor)",
    _compute, _fake,
)  # fmt: skip
