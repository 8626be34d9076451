"""The compiled kernels, csrc/ops/gate_residual_norm_modulate; norm_modulate is the case without y.

x, y, ... [..., D] dense, R rows in all; gate, scale, shift [M, D] float32 tables, unit stride in D, all with M rows.
"""

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import DTYPES


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int]:
    """Rows, width, rows that share a modulation row."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    return rows, dim, rows // groups


def forward(
    x_out: Tensor | None, h: Tensor, x: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int, offset: float, eps: float,
) -> None:  # fmt: skip
    """x_out = x + gate y (with y), h = LayerNorm(x_out) (offset + scale) + shift; `groups` is M."""
    device, stream = dispatch.queue(x)
    error = dispatch.compiled().gate_residual_norm_modulate(
        *map(_pointer, (x_out, h, x, y, gate, scale, shift)), *_sizes(x, groups),
        *map(_stride, (gate, scale, shift)), offset, eps, DTYPES[x.dtype], device, stream,
    )  # fmt: skip
    dispatch.check("gate_residual_norm_modulate", error, x)


def backward(
    dx: Tensor, dy: Tensor | None, dh: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, groups: int, offset: float, eps: float,
) -> Tensor:  # fmt: skip
    """Writes dx (and dy with a gate); returns the table gradients [M, 2 or 3, D]: dscale, dshift, dgate."""
    device, stream = dispatch.queue(x_out)
    size, dim = _sizes(x_out, groups), x_out.shape[-1]
    runs = dispatch.compiled().gate_residual_norm_modulate_runs(*size, DTYPES[x_out.dtype], device)
    dispatch.check("gate_residual_norm_modulate", max(-runs, 0), x_out)
    kinds = 2 if gate is None else 3
    sums = torch.empty(groups, kinds, dim, dtype=torch.float32, device=x_out.device)
    partial = sums if runs == groups else torch.empty(runs, kinds, dim, dtype=torch.float32, device=x_out.device)
    error = dispatch.compiled().gate_residual_norm_modulate_backward(
        *map(_pointer, (dx, dy, sums, partial, dh, dx_out, x_out, y, gate, scale)), *size,
        *map(_stride, (gate, scale)), offset, eps, DTYPES[x_out.dtype], device, stream,
    )  # fmt: skip
    dispatch.check("gate_residual_norm_modulate backward", error, x_out)
    return sums
