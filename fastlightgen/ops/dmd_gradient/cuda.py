"""dmd_gradient through the compiled kernel, csrc/ops/dmd_gradient."""

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import DTYPES


def forward(grad: Tensor, normaliser: Tensor, x: list[Tensor], v: list[Tensor], scalars: list[Tensor]) -> None:
    """x: x0, x_t; v: fake, weak_cond, weak_null, strong_cond, dense [B, ...]; scalars: t, beta1, beta2 float32 [B]."""
    samples = len(grad)
    device, stream = dispatch.queue(grad)
    partial = torch.empty(samples, dispatch.extension().dmd_gradient_blocks, dtype=torch.float32, device=grad.device)
    error = dispatch.extension().dmd_gradient(
        *(t.data_ptr() for t in (grad, normaliser, partial, *x, *v, *scalars)),
        samples, grad.numel() // samples, DTYPES[grad.dtype], DTYPES[v[0].dtype], device, stream,
    )  # fmt: skip
    dispatch.check("dmd_gradient", error, grad)
