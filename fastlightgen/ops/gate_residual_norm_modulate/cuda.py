"""gate_residual_norm_modulate with the compiled kernels, csrc/ops/gate_residual_norm_modulate. No y: norm_modulate.

x, y, h and x_out are [..., D], dense, with R rows in total; gate, scale and shift are float32 tables [M, D] with dense
rows.
"""

from typing import Any

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import DTYPES


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _fields(x: Tensor, groups: int, offset: float, eps: float) -> dict[str, Any]:
    """The launchers' fields beside the tensors: R, D and R / M, the rows of x per table row; norm, type, device."""
    dim = x.shape[-1]
    rows = x.numel() // dim
    device, stream = dispatch.queue(x)
    return {
        "rows": rows, "dim": dim, "rows_per_mod": rows // groups, "offset": offset, "eps": eps,
        "dtype": DTYPES[x.dtype], "device": device, "stream": stream,
    }  # fmt: skip


def forward(
    x_out: Tensor | None, h: Tensor, x: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, groups: int, offset: float, eps: float,
) -> None:  # fmt: skip
    """Write x_out = x + gate y (if y is given) and h = LayerNorm(x_out) (offset + scale) + shift; `groups` is M."""
    fields = _fields(x, groups, offset, eps) | {
        "x_out": _pointer(x_out), "h": _pointer(h), "x": _pointer(x), "y": _pointer(y),
        "gate": _pointer(gate), "scale": _pointer(scale), "shift": _pointer(shift),
        "gate_stride": _stride(gate), "scale_stride": _stride(scale), "shift_stride": _stride(shift),
    }  # fmt: skip
    error = dispatch.compiled().gate_residual_norm_modulate(fields)
    dispatch.check("gate_residual_norm_modulate", error, x)


def backward(
    dx: Tensor, dy: Tensor | None, dh: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor | None,
    gate: Tensor | None, scale: Tensor | None, groups: int, offset: float, eps: float,
) -> Tensor:  # fmt: skip
    """Write dx and, with a gate, dy; return dscale, dshift and, with a gate, dgate as [M, 2 or 3, D]."""
    fields = _fields(x_out, groups, offset, eps)
    dim, device = fields["dim"], fields["device"]
    runs = dispatch.compiled().gate_residual_norm_modulate_runs(
        fields["rows"], dim, fields["rows_per_mod"], fields["dtype"], device
    )
    dispatch.check("gate_residual_norm_modulate", max(-runs, 0), x_out)  # a negative number is a cudaError
    kinds = 2 if gate is None else 3
    sums = torch.empty(groups, kinds, dim, dtype=torch.float32, device=x_out.device)
    # With one run per table row the kernel's partial sums are the final ones: no scratch tensor, no second pass.
    partial = sums if runs == groups else torch.empty(runs, kinds, dim, dtype=torch.float32, device=x_out.device)
    fields |= {
        "dx": _pointer(dx), "dy": _pointer(dy), "sums": sums.data_ptr(), "partial": partial.data_ptr(),
        "dh": _pointer(dh), "dx_out": _pointer(dx_out), "x_out": _pointer(x_out), "y": _pointer(y),
        "gate": _pointer(gate), "scale": _pointer(scale), "gate_stride": _stride(gate), "scale_stride": _stride(scale),
    }  # fmt: skip
    error = dispatch.compiled().gate_residual_norm_modulate_backward(fields)
    dispatch.check("gate_residual_norm_modulate backward", error, x_out)
    return sums
