"""The deferred residual: x + gate y of the previous block, fused with the norm that follows it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.gate_residual_norm_modulate import reference
from fastlightgen.ops.gate_residual_norm_modulate.reference import add_residual
from fastlightgen.ops.norm_modulate import norm_modulate
from fastlightgen.ops.tables import align, check_together, dense, dense_rows, kernel_takes, tables

__all__ = ["add_residual", "gate_residual_norm_modulate"]

_NAME = "gate_residual_norm_modulate"


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x', h): x' = x + gate y, then h = LayerNorm(x') (1 + scale) + shift, or LayerNorm(x') weight + bias.

    x, y are [B, ..., D]; gate, scale, shift [B, D], or of x's rank with every axis full or 1; weight, bias [D].
    Without y, x' = x; without gate, x' = x + y. The norm reads x' after it is rounded to x's dtype.
    """
    check_together(_NAME, x, y=y, gate=gate, scale=scale, shift=shift, weight=weight, bias=bias)
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype):
        got, wanted = f"{tuple(y.shape)} {y.dtype}", f"{tuple(x.shape)} {x.dtype}"
        raise ValueError(f"{_NAME}: y got {got}, wanted x's {wanted}; cast or reshape it")
    if (scale is None) != (shift is None) or (scale is not None and weight is not None):
        raise ValueError(f"{_NAME}: scale and shift come together and without weight and bias; pass one of the pairs")
    if y is None:
        if scale is None or shift is None:
            return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return x, norm_modulate(x, scale, shift, eps)
    if x.is_cpu and not torch.compiler.is_compiling() and dispatch.backend_for("cpu") == "reference":
        mods = (("gate", gate), ("scale", scale), ("shift", shift))
        gate, scale, shift = (None if mod is None else align(_NAME, name, mod, x) for name, mod in mods)
        return reference.gate_residual_norm_modulate(x, y, gate, scale, shift, eps, weight, bias)
    # An affine norm becomes a modulation with offset 0: weight takes the place of scale, bias that of shift.
    if scale is not None:
        gate, scale, shift = tables(_NAME, x, gate=gate, scale=scale, shift=shift)
    elif gate is not None:  # the kernels want as many rows of weight as of gate
        (gate,) = tables(_NAME, x, gate=gate)
        weight, bias = (None if w is None else w.expand(gate.shape[0], -1) for w in (weight, bias))
    if scale is None:
        scale, shift = (None if w is None else w.reshape(-1, x.shape[-1]).float() for w in (weight, bias))
    return _call(x, y, gate, scale, shift, weight is not None, eps)


def _groups(*mods: Tensor | None) -> int:
    """M, the number of rows of the tables; 1 without any."""
    return next((t.shape[0] for t in mods if t is not None), 1)


def _forward(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, affine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return _fake(x, y, gate, scale, shift, affine, eps)
    backend = dispatch.backend_for(x.device.type)
    if backend == "reference" or not kernel_takes(x):
        x_out, h = reference.on_tables(x, y, gate, scale, shift, affine, eps)
        return x_out.reshape(x.shape).contiguous(), h.reshape(x.shape).contiguous()
    x, y = dense(x), dense(y)
    x_out, h = torch.empty_like(x), torch.empty_like(x)
    mods = (dense_rows(table) for table in (gate, scale, shift))
    kernels = dispatch.kernels(_NAME, backend)
    kernels.forward(x_out, h, x, y, *mods, _groups(gate, scale), 0.0 if affine else 1.0, eps)
    return x_out, h


def _backward(
    dh: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    affine: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dx, dy, dscale, dshift, dgate. Without a gate dy equals dx, so dy and dgate are returned empty."""
    if not x_out.numel():
        empty = _fake_backward(dh, dx_out, x_out, y, gate, scale, affine, eps)
        for t in empty:
            t.zero_()
        return empty
    backend = dispatch.backend_for(x_out.device.type)
    none = x_out.new_empty(0)
    if backend == "reference" or not kernel_takes(x_out):
        flat = x_out.reshape(-1, x_out.shape[-1])
        dx_out, y = (None if t is None else t.reshape(flat.shape) for t in (dx_out, y))
        grads = reference.gradient(dh.reshape(flat.shape), dx_out, flat, y, gate, scale, affine, eps)
        dx, dscale, dshift = grads[0].reshape(x_out.shape), grads[2], grads[3]
        dy, dgate = none if grads[1] is None else grads[1].reshape(x_out.shape), grads[4]
        dgate = dscale.new_empty(0) if dgate is None else dgate
        return dx.contiguous(), dy.contiguous(), dscale.contiguous(), dshift.contiguous(), dgate.contiguous()
    x_out, dh, dx_out, y = dense(x_out), dense(dh), dense(dx_out), dense(y)
    gate, scale = dense_rows(gate), dense_rows(scale)
    dx, dy = torch.empty_like(x_out), none if gate is None else torch.empty_like(x_out)
    kernels = dispatch.kernels(_NAME, backend)
    mods = (gate, scale, _groups(gate, scale), 0.0 if affine else 1.0, eps)
    sums = kernels.backward(dx, None if gate is None else dy, dh, dx_out, x_out, y, *mods)
    tables = [s.contiguous() for s in sums.unbind(1)]  # dscale, dshift and with a gate dgate
    return dx, dy, tables[0], tables[1], none.float() if gate is None else tables[2]


def _fake(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, affine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(
    dh: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    affine: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if x_out.dtype == torch.float64 else torch.float32
    table = x_out.new_empty((_groups(gate, scale), x_out.shape[-1]), dtype=wide)
    none = gate is None
    dy, dgate = (x_out.new_empty(0), table.new_empty(0)) if none else (x_out.new_empty(x_out.shape), table.clone())
    return x_out.new_empty(x_out.shape), dy, table, table.clone(), dgate


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    _, y, gate, scale, shift, ctx.affine, ctx.eps = inputs
    ctx.save_for_backward(output[0], None if gate is None else y, gate, scale)
    ctx.has_shift = shift is not None
    ctx.set_materialize_grads(False)  # an unused x' then has the gradient None, and the kernel adds nothing


def _autograd(ctx, dx_out: Tensor | None, dh: Tensor | None) -> tuple:
    x_out, y, gate, scale = ctx.saved_tensors
    dh = torch.zeros_like(x_out) if dh is None else dh
    backward = torch.ops.fastlightgen.gate_residual_norm_modulate_backward
    dx, dy, dscale, dshift, dgate = backward(dh, dx_out, x_out, y, gate, scale, ctx.affine, ctx.eps)
    dscale, dshift = dscale if scale is not None else None, dshift if ctx.has_shift else None
    return (dx, dx, None, dscale, dshift, None, None) if gate is None else (dx, dy, dgate, dscale, dshift, None, None)


_call = dispatch.register(
    f"{_NAME}(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, bool affine, float eps)"
    " -> (Tensor, Tensor)",
    _forward, _fake, _setup_context, _autograd,
)  # fmt: skip
dispatch.register(
    f"{_NAME}_backward(Tensor dh, Tensor? dx_out, Tensor x_out, Tensor? y, Tensor? gate, Tensor? scale, bool affine,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward,
)  # fmt: skip
