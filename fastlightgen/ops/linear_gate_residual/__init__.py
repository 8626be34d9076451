"""The last matrix product of a block, fused with the residual: the product itself is never written to memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.gemm import cast, check, takes
from fastlightgen.ops.linear_gate_residual import reference
from fastlightgen.ops.tables import align, dense, tables

__all__ = ["linear_gate_residual"]

_NAME = "linear_gate_residual"


def linear_gate_residual(c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """c + gate (x weight^T + bias): c [B, ..., N], x [B, ..., K], weight [N, K], bias [N].

    gate is [B, N], or has c's rank with every axis full or 1: one gate, and one kernel launch, per sample or frame.

    Activation checkpointing stores one hidden tensor between blocks, so there a block ends with this operator. It moves
    4 bytes per element (reads c, writes the result) instead of 8 (writes y; reads x and y, writes the result), and the
    backward pass does not compute the product again. Elsewhere gate_residual_norm_modulate adds y in the next norm,
    which moves 8 bytes per element: as many as this operator and a separate norm together.
    """
    check(_NAME, x, weight, bias, c=c, gate=gate)
    if c.shape != (*x.shape[:-1], len(weight)) or c.dtype != x.dtype:
        got, wanted = f"{tuple(c.shape)} {c.dtype}", f"{(*x.shape[:-1], len(weight))} {x.dtype}"
        raise ValueError(f"{_NAME}: c got {got}, wanted {wanted}, as x and weight give it; cast or reshape it")
    if not takes(_NAME, x, weight):
        return reference.linear_gate_residual(c, align(_NAME, "gate", gate, c), x, weight, bias)
    weight, bias = cast(weight), None if bias is None else cast(bias)
    (gate,) = tables(_NAME, c, gate=gate)
    operands = c, gate, x, weight, bias
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    out = _Saved.apply(*operands) if tracked else _empty(c)
    _product(out.detach(), *operands)  # detached: autograd must not see the write into its result
    return out


def _empty(c: Tensor) -> Tensor:
    return torch.empty_like(c, memory_format=torch.contiguous_format)


def _product(out: Tensor, c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Write c + gate (x weight^T + bias) into out with the CUTLASS kernel; gate is a table [M, N]."""
    c, gate, x, weight, bias = dense(c), dense(gate), dense(x), dense(weight), dense(bias)
    rows, inner = x.numel() // x.shape[-1], x.shape[-1]
    device, stream = dispatch.queue(x)
    fields = {
        "out": out.data_ptr(), "c": c.data_ptr(), "x": x.data_ptr(), "weight": weight.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(), "gate": gate.data_ptr(), "rows": rows, "dim": len(weight),
        "inner": inner, "rows_per_mod": rows // len(gate), "device": device, "stream": stream,
    }  # fmt: skip
    error = dispatch.compiled().linear_gate_residual(fields)
    dispatch.check(_NAME, error, x)


def _forward(c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The registered operator; gate is a table [M, N], and each of its rows applies to 1 / M of the rows of c."""
    groups = len(gate)
    if not takes(_NAME, x, weight):
        z = F.linear(x, weight, bias).reshape(groups, -1, len(weight))
        return reference.add_residual(c.reshape(z.shape), z, gate[:, None]).view(c.shape)
    out = _empty(c)
    _product(out, c, gate, x, weight, bias)
    return out


def _fake(c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return c.new_empty(c.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])  # the gradient does not depend on c


def _autograd(ctx, dout: Tensor) -> tuple:
    """The gradients of c, gate, x, weight and bias.

    z = x weight^T + bias was never stored, so dgate = colsum(dout z) is computed without it. For each group of rows
    with one gate, P = dout^T x gives dweight = gate P and dgate = rowsum(P weight) + bias colsum(dout) (elementwise
    products). dx = dout (gate weight): the gate multiplies the weight, which is smaller than dout.
    """
    gate, x, weight, bias = ctx.saved_tensors
    _, for_gate, for_x, for_weight, _ = ctx.needs_input_grad
    groups = len(gate)
    dx: list[Tensor] = []  # one entry per group of rows
    dgate: list[Tensor] = []
    dweight: Tensor | None = None
    dbias = gate.new_zeros(())
    for d, rows, g in zip(*(t.reshape(groups, -1, t.shape[-1]) for t in (dout, x)), gate):
        total = d.sum(0, dtype=gate.dtype)
        dbias = dbias + g * total
        if for_x:
            dx.append(d @ (g[:, None] * weight).to(weight.dtype))
        if for_gate or for_weight:
            product = d.mT @ rows  # P [N, K]
            dgate.append((product * weight).sum(1, dtype=gate.dtype) + (0 if bias is None else bias * total))
            if for_weight:
                dweight = g[:, None] * product if dweight is None else dweight + g[:, None] * product
    return (
        dout,
        torch.stack(dgate) if for_gate else None,
        (dx[0] if groups == 1 else torch.cat(dx)).view(x.shape) if for_x else None,
        None if dweight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )


class _Saved(torch.autograd.Function):
    """Saves the inputs for the backward pass and returns an empty result, which the caller then fills.

    The order matters under activation checkpointing: it recomputes a block only until all its tensors are saved. The
    backward pass does not need the product, so saving before computing it skips the block's last product.
    """

    @staticmethod
    def forward(ctx, c, gate, x, weight, bias):
        ctx.save_for_backward(gate, x, weight, bias)
        return _empty(c)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple:
        return _autograd(ctx, dout)


dispatch.register(
    f"{_NAME}(Tensor c, Tensor gate, Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward, _fake, _setup_context, _autograd,
)  # fmt: skip
