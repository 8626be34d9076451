"""A pending residual with two successors: x' and the norms of both in one pass, 10 bytes an element instead of 12.

The walk does not use it. Where it forks, the second successor is another block that runs later: its modulation would
have to be there early (ZeRO-3 gathers a block's weights when it runs, and a block reads no other's), h2 would wait
beside x' and, under activation checkpointing, be kept. What it would save at a fork, of which a dual walk has one, is
4 bytes an element against the 36 of every block (14 today: the sum, 6, and two norms): less than a thousandth.
"""

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.gate_residual_norm_modulate import reference
from fastlightgen.ops.tables import align, check_together, dense, dense_rows, kernel_takes, tables

_NAME = "gate_residual_norm_modulate_fork"


def gate_residual_norm_modulate_fork(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, scale2: Tensor, shift2: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', h, h2): x' = x + gate y, h = LayerNorm(x') (1 + scale) + shift, and h2 the same with scale2 and shift2.

    x, y [B, ..., D]; gate and the tables [B, D], or x's rank with every axis full or 1. The norms see the rounded x'.
    """
    mods = {"gate": gate, "scale": scale, "shift": shift, "scale2": scale2, "shift2": shift2}
    check_together(_NAME, x, y=y, **mods)
    if y.shape != x.shape or y.dtype != x.dtype:
        got, wanted = f"{tuple(y.shape)} {y.dtype}", f"{tuple(x.shape)} {x.dtype}"
        raise ValueError(f"{_NAME}: y got {got}, wanted x's {wanted}; cast or reshape it")
    if x.is_cpu and not torch.compiler.is_compiling() and dispatch.backend_for("cpu") == "reference":
        aligned = (align(_NAME, name, mod, x) for name, mod in mods.items())
        return reference.gate_residual_norm_modulate_fork(x, y, *aligned, eps)
    return _call(x, y, *tables(_NAME, x, **mods), eps)


def _forward(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, scale2: Tensor, shift2: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return _fake(x, y, gate, scale, shift, scale2, shift2, eps)
    backend, mods = dispatch.backend_for(x.device.type), (gate, scale, shift, scale2, shift2)
    if backend == "reference" or not kernel_takes(x):
        groups = (v.reshape(len(gate), -1, x.shape[-1]) for v in (x, y))
        out = reference.gate_residual_norm_modulate_fork(*groups, *(m[:, None] for m in mods), eps)
        return tuple(v.reshape(x.shape).contiguous() for v in out)
    x, y = dense(x), dense(y)
    out = tuple(torch.empty_like(x) for _ in range(3))
    dispatch.kernels("gate_residual_norm_modulate", backend).fork(*out, x, y, *map(dense_rows, mods), eps)
    return out


def _backward(
    dh: Tensor, dh2: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor, gate: Tensor, scale: Tensor,
    scale2: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dy, dscale, dshift, dscale2, dshift2, dgate; tables as in the forward."""
    if not x_out.numel():
        return tuple(t.zero_() for t in _fake_backward(dh, dh2, dx_out, x_out, y, gate, scale, scale2, eps))
    backend = dispatch.backend_for(x_out.device.type)
    if backend == "reference" or not kernel_takes(x_out):
        flat = (None if t is None else t.reshape(-1, x_out.shape[-1]) for t in (dh, dh2, dx_out, x_out, y))
        dx, dy, *mods = reference.fork_gradient(*flat, gate, scale, scale2, eps)
        return *(t.reshape(x_out.shape).contiguous() for t in (dx, dy)), *(t.contiguous() for t in mods)
    dh, dh2, dx_out, x_out, y = map(dense, (dh, dh2, dx_out, x_out, y))
    dx, dy = torch.empty_like(x_out), torch.empty_like(x_out)
    kernels = dispatch.kernels("gate_residual_norm_modulate", backend)
    sums = kernels.fork_backward(dx, dy, dh, dh2, dx_out, x_out, y, *map(dense_rows, (gate, scale, scale2)), eps)
    return dx, dy, *(s.contiguous() for s in sums.unbind(1))


def _fake(x, y, gate, scale, shift, scale2, shift2, eps):
    return tuple(x.new_empty(x.shape) for _ in range(3))


def _fake_backward(dh, dh2, dx_out, x_out, y, gate, scale, scale2, eps):
    return *(x_out.new_empty(x_out.shape) for _ in range(2)), *(gate.new_empty(gate.shape) for _ in range(5))


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    _, y, gate, scale, _, scale2, _, ctx.eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale, scale2)
    ctx.set_materialize_grads(False)  # an x' that nobody reads has no gradient to add


def _autograd(ctx, dx_out: Tensor | None, dh: Tensor | None, dh2: Tensor | None) -> tuple:
    x_out, *others = ctx.saved_tensors
    dh, dh2 = (torch.zeros_like(x_out) if t is None else t for t in (dh, dh2))
    backward = torch.ops.fastlightgen.gate_residual_norm_modulate_fork_backward
    dx, dy, dscale, dshift, dscale2, dshift2, dgate = backward(dh, dh2, dx_out, x_out, *others, ctx.eps)
    return dx, dy, dgate, dscale, dshift, dscale2, dshift2, None


_call = dispatch.register(
    f"{_NAME}(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, Tensor scale2, Tensor shift2, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _forward, _fake, _setup_context, _autograd,
)  # fmt: skip
dispatch.register(
    f"{_NAME}_backward(Tensor dh, Tensor dh2, Tensor? dx_out, Tensor x_out, Tensor y, Tensor gate, Tensor scale,"
    " Tensor scale2, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward,
)  # fmt: skip
