"""gate_residual_norm_modulate in Triton, for installations without the CUDA kernels. Same signatures as cuda.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlightgen.ops.runs import on_device, split, warps


@triton.jit
def _table(table, mod, stride, col, mask, given: tl.constexpr, absent: tl.constexpr):
    """Row `mod` of a modulation table, or the constant `absent` if no table is given."""
    if given:
        return tl.load(table + mod * stride + col, mask=mask, other=0.0)
    else:
        return tl.where(mask, absent, absent)


@triton.jit
def _forward(
    x_out, h, x, y, gate, scale, shift, rows_per_mod, gate_stride, scale_stride, shift_stride, offset, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, Y: tl.constexpr, GATE: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    # One program per row of x.
    row = tl.program_id(0).to(tl.int64)
    mod = row // rows_per_mod
    col = tl.arange(0, BLOCK)
    mask = col < D
    at = row * D + col
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if Y:
        add = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        rounded = (v + _table(gate, mod, gate_stride, col, mask, GATE, 1.0) * add).to(x_out.dtype.element_ty)
        tl.store(x_out + at, rounded, mask=mask)
        v = rounded.to(tl.float32)  # the norm reads the stored, rounded value
    # Two passes over registers: E[x^2] - E[x]^2 would lose digits if the mean is large.
    centred = tl.where(mask, v - tl.sum(v, 0) / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    gain = offset + _table(scale, mod, scale_stride, col, mask, SCALE, 0.0)
    out = centred * rstd * gain + _table(shift, mod, shift_stride, col, mask, SHIFT, 0.0)
    tl.store(h + at, out.to(h.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dx, dy, partial, dh, dx_out, x_out, y, gate, scale, rows_per_mod, per_mod, gate_stride, scale_stride, offset, eps,
    LENGTH: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, KINDS: tl.constexpr, DX_OUT: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    # One program per run of LENGTH rows that share table row `mod`. With n = LayerNorm(x') and g = dh gain:
    # dx = dx' + rstd (g - mean(g) - n mean(g n)), dy = gate dx, dscale = sum dh n, dshift = sum dh, dgate = sum dx y.
    run = tl.program_id(0).to(tl.int64)
    mod = run // per_mod
    first = mod * rows_per_mod + run % per_mod * LENGTH
    col = tl.arange(0, BLOCK)
    in_row = col < D
    gain = offset + _table(scale, mod, scale_stride, col, in_row, SCALE, 0.0)
    dscale = tl.zeros([BLOCK], tl.float32)
    dshift = tl.zeros([BLOCK], tl.float32)
    dgate = tl.zeros([BLOCK], tl.float32)
    for i in range(LENGTH):  # rows past the last one of the table row are masked and add zeros to the sums
        at = (first + i) * D + col
        mask = in_row & (first + i < (mod + 1) * rows_per_mod)
        v = tl.load(x_out + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dh + at, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(in_row, v - tl.sum(v, 0) / D, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        n = centred * rstd
        g = tl.where(in_row, d * gain, 0.0)
        dscale += d * n
        dshift += d
        out = rstd * (g - tl.sum(g, 0) / D - n * (tl.sum(g * n, 0) / D))
        if DX_OUT:
            out += tl.load(dx_out + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
        if KINDS > 2:
            dgate += out * tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
            out *= tl.load(gate + mod * gate_stride + col, mask=mask, other=0.0)
            tl.store(dy + at, out.to(dy.dtype.element_ty), mask=mask)
    to = partial + run * KINDS * D + col
    tl.store(to, dscale, mask=in_row)
    tl.store(to + D, dshift, mask=in_row)
    if KINDS > 2:
        tl.store(to + 2 * D, dgate, mask=in_row)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(
    x_out: Tensor | None, h: Tensor, x: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int, offset: float, eps: float,
) -> None:  # fmt: skip
    """Write x_out = x + gate y (if y is given) and h = LayerNorm(x_out) (offset + scale) + shift; `groups` is M."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    block = triton.next_power_of_2(dim)
    given = {"Y": y is not None, "GATE": gate is not None, "SCALE": scale is not None, "SHIFT": shift is not None}
    strides = map(_stride, (gate, scale, shift))
    with on_device(x):
        _forward[(rows,)](
            x_out, h, x, y, gate, scale, shift, rows // groups, *strides, offset, eps,
            D=dim, BLOCK=block, **given, num_warps=warps(block),
        )  # fmt: skip


def backward(
    dx: Tensor, dy: Tensor | None, dh: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, groups: int, offset: float, eps: float,
) -> Tensor:  # fmt: skip
    """Write dx and, with a gate, dy; return dscale, dshift and, with a gate, dgate as [M, 2 or 3, D]."""
    dim = x_out.shape[-1]
    rows = x_out.numel() // dim
    block, kinds = triton.next_power_of_2(dim), 2 if gate is None else 3
    per_mod, length = split(rows // groups, groups, x_out)
    partial = torch.empty(groups * per_mod, kinds, dim, dtype=torch.float32, device=x_out.device)
    with on_device(x_out):
        _backward[(groups * per_mod,)](
            dx, dy, partial, dh, dx_out, x_out, y, gate, scale, rows // groups, per_mod,
            *map(_stride, (gate, scale)), offset, eps, LENGTH=length, D=dim, BLOCK=block, KINDS=kinds,
            DX_OUT=dx_out is not None, SCALE=scale is not None, num_warps=warps(block),
        )  # fmt: skip
    return partial.view(groups, per_mod, kinds, dim).sum(1)  # torch adds in a fixed order: same bits
