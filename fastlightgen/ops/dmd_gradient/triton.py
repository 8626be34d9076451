"""dmd_gradient in Triton. Two launches, because Triton has no grid-wide barrier. Same signature as cuda.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlightgen.ops.runs import on_device


@triton.jit
def _real(weak, null, strong, beta1, beta2, at, mask):
    """v_real of Eq. 9."""
    w = tl.load(weak + at, mask=mask, other=0.0).to(tl.float32)
    n = tl.load(null + at, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(strong + at, mask=mask, other=0.0).to(tl.float32)
    return beta1 * (w - n) + beta2 * (s - w) + n


@triton.jit
def _distance(partial, x0, x_t, weak, null, strong, t, beta1, beta2, size, BLOCK: tl.constexpr):
    """First launch: the sum of |x0 - x0_real| over each block of a sample."""
    sample = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, at = col < size, sample.to(tl.int64) * size + col
    real = _real(weak, null, strong, tl.load(beta1 + sample), tl.load(beta2 + sample), at, mask)
    x0_real = tl.load(x_t + at, mask=mask, other=0.0).to(tl.float32) - tl.load(t + sample) * real
    away = tl.abs(tl.load(x0 + at, mask=mask, other=0.0).to(tl.float32) - x0_real)
    tl.store(partial + sample * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(mask, away, 0.0), 0))


@triton.jit
def _gradient(grad, normaliser, fake, weak, null, strong, t, beta1, beta2, size, BLOCK: tl.constexpr):
    """Second launch: grad = t (v_real - v_fake) / normaliser (Eq. 8)."""
    sample = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, at = col < size, sample.to(tl.int64) * size + col
    real = _real(weak, null, strong, tl.load(beta1 + sample), tl.load(beta2 + sample), at, mask)
    factor = tl.load(t + sample) / tl.load(normaliser + sample)
    out = factor * (real - tl.load(fake + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(grad + at, out.to(grad.dtype.element_ty), mask=mask)


def forward(grad: Tensor, normaliser: Tensor, x: list[Tensor], v: list[Tensor], scalars: list[Tensor]) -> None:
    """Write grad and normaliser; the arguments are those of cuda.py."""
    size, block = grad[0].numel(), 2048
    grid = (triton.cdiv(size, block), len(grad))
    partial = torch.empty(grid[::-1], dtype=torch.float32, device=grad.device)
    with on_device(grad):
        _distance[grid](partial, *x, *v[1:], *scalars, size, BLOCK=block)
        normaliser.copy_(partial.sum(1) / size + 1e-6)  # torch adds in a fixed order: the same bits at every run
        _gradient[grid](grad, normaliser, *v, *scalars, size, BLOCK=block)
