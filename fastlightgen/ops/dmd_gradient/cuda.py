"""dmd_gradient with the compiled kernel, csrc/ops/dmd_gradient."""

from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import DTYPES


def forward(grad: Tensor, normaliser: Tensor, x: list[Tensor], v: list[Tensor], scalars: list[Tensor]) -> None:
    """Write grad and normaliser.

    x holds x0, x_t; v holds fake, weak_cond, weak_null, strong_cond, all dense [B, ...]; scalars holds t, beta1, beta2,
    float32 [B].
    """
    samples, extension = grad.shape[0], dispatch.compiled()
    device, stream = dispatch.queue(grad)
    partial = normaliser.new_empty((samples, extension.dmd_gradient_blocks))
    error = extension.dmd_gradient(
        *[t.data_ptr() for t in (grad, normaliser, partial, *x, *v, *scalars)],
        samples, grad.numel() // samples, DTYPES[grad.dtype], DTYPES[v[0].dtype], device, stream,
    )  # fmt: skip
    dispatch.check("dmd_gradient", error, grad)
