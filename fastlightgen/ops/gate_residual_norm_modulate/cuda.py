"""gate_residual_norm_modulate with the compiled kernels, csrc/ops/gate_residual_norm_modulate. No y: norm_modulate.

x, y, h and x_out are [..., D], dense, with R rows in total; gate, scale and shift are float32 tables [M, D] with dense
rows.
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
    """R, D and R / M, the rows of x per table row."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    return rows, dim, rows // groups


def forward(
    x_out: Tensor | None, h: Tensor, x: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int, offset: float, eps: float,
) -> None:  # fmt: skip
    """Write x_out = x + gate y (if y is given) and h = LayerNorm(x_out) (offset + scale) + shift; `groups` is M."""
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
    """Write dx and, with a gate, dy; return dscale, dshift and, with a gate, dgate as [M, 2 or 3, D]."""
    device, stream = dispatch.queue(x_out)
    size, dim = _sizes(x_out, groups), x_out.shape[-1]
    runs = dispatch.compiled().gate_residual_norm_modulate_runs(*size, DTYPES[x_out.dtype], device)
    dispatch.check("gate_residual_norm_modulate", max(-runs, 0), x_out)  # a negative number is a cudaError
    kinds = 2 if gate is None else 3
    sums = torch.empty(groups, kinds, dim, dtype=torch.float32, device=x_out.device)
    # With one run per table row the kernel's partial sums are the final ones: no scratch tensor, no second pass.
    partial = sums if runs == groups else torch.empty(runs, kinds, dim, dtype=torch.float32, device=x_out.device)
    error = dispatch.compiled().gate_residual_norm_modulate_backward(
        *map(_pointer, (dx, dy, sums, partial, dh, dx_out, x_out, y, gate, scale)), *size,
        *map(_stride, (gate, scale)), offset, eps, DTYPES[x_out.dtype], device, stream,
    )  # fmt: skip
    dispatch.check("gate_residual_norm_modulate backward", error, x_out)
    return sums
