"""norm_modulate(x, scale, shift) = LayerNorm(x) (1 + scale) + shift: the adaptive norm before a branch of a block.

The kernels are those of gate_residual_norm_modulate, called without a residual.
"""

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.norm_modulate import reference
from fastlightgen.ops.tables import align, check_together, dense, dense_rows, kernel_takes, tables

_NAME = "norm_modulate"


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights over the last axis of x [B, ..., D], then * (1 + scale) + shift; returns x's dtype.

    scale and shift are [B, D], one row per sample, or have x's rank with every axis full or 1 ([B, 1, D], [B, N, D]).
    """
    check_together(_NAME, x, scale=scale, shift=shift)
    # Eager CPU calls skip the dispatcher: torch's own LayerNorm backward is 4 times faster than _backward.
    if x.is_cpu and not torch.compiler.is_compiling() and dispatch.backend_for("cpu") == "reference":
        scale, shift = align(_NAME, "scale", scale, x), align(_NAME, "shift", shift, x)
        return reference.norm_modulate(x, scale, shift, eps)
    return _call(x, *tables(_NAME, x, scale=scale, shift=shift), eps)


def _forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The registered operator, on tables: runs a kernel, or the reference where kernels do not apply."""
    backend, groups = dispatch.backend_for(x.device.type), scale.shape[0]
    if backend == "reference" or not kernel_takes(x):
        grouped = x.reshape(groups, -1, x.shape[-1]) if x.numel() else x
        return reference.norm_modulate(grouped, scale[:, None], shift[:, None], eps).reshape(x.shape).contiguous()
    x = dense(x)
    h = torch.empty_like(x)
    kernels = dispatch.kernels("gate_residual_norm_modulate", backend)
    kernels.forward(None, h, x, None, None, dense_rows(scale), dense_rows(shift), groups, 1.0, eps)
    return h


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, scale, _, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _autograd(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, scale = ctx.saved_tensors
    backward = torch.ops.fastlightgen.gate_residual_norm_modulate_backward
    dx, _, dscale, dshift, _ = backward(dh, None, x, None, None, scale, False, ctx.eps)
    return dx, dscale, dshift, None


def _fake(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_call = dispatch.register(
    "norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor",
    _forward, _fake, _setup_context, _autograd,
)  # fmt: skip
