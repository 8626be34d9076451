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
    names = ("x0", "x_t", "v_fake", "v_weak_cond", "v_weak_null", "v_strong_cond", "t", "beta1", "beta2")
    fields = {name: tensor.data_ptr() for name, tensor in zip(names, (*x, *v, *scalars))} | {
        "grad": grad.data_ptr(), "normaliser": normaliser.data_ptr(), "partial": partial.data_ptr(),
        "samples": samples, "size": grad.numel() // samples, "x_dtype": DTYPES[grad.dtype],
        "v_dtype": DTYPES[v[0].dtype], "device": device, "stream": stream,
    }  # fmt: skip
    error = extension.dmd_gradient(fields)
    dispatch.check("dmd_gradient", error, grad)
