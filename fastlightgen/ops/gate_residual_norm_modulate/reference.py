"""The specification of gate_residual_norm_modulate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops.norm_modulate.reference import gradient as norm_gradient
from fastlightgen.ops.norm_modulate.reference import norm_modulate


def add_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate y, or x + y without a gate; computed in float32 (float64 stays float64), rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if gate is None:
        return x + y if x.dtype == y.dtype else (x.to(wide) + y.to(wide)).to(x.dtype)
    gate = gate[:, None] if gate.dim() == 2 else gate
    if x.dtype == y.dtype == gate.dtype:  # torch's addcmul computes 16-bit types in float32 itself
        return torch.addcmul(x, y, gate)
    # Of mixed types it makes float32 too, without float32 copies of x and y.
    return torch.addcmul(x, y, gate.to(wide)).to(x.dtype)


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

    x, y are [B, L, D]; gate, scale, shift [B, D] or [B, L or 1, D]. Without y, x' = x; without gate, x' = x + y. The
    norm reads x' after it is rounded to x's dtype.
    """
    if y is not None:
        x = add_residual(x, y, gate)
    if scale is None or shift is None:
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    scale, shift = (m[:, None] if m.dim() == 2 else m for m in (scale, shift))
    return x, norm_modulate(x, scale, shift, eps)


def on_tables(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, affine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The same for tables [M, D] and x with M equal groups of rows; `affine`: scale and shift are weight and bias."""
    groups = next((t.shape[0] for t in (gate, scale, shift) if t is not None), 1)
    x, y = (v.reshape(groups, -1, v.shape[-1]) for v in (x, y))
    x = add_residual(x, y, gate)
    if affine or scale is None or shift is None:
        # All rows of these tables are equal: the operator repeats weight and bias for the kernels.
        weight, bias = (None if t is None else t[0].to(x.dtype) for t in (scale, shift))
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, norm_modulate(x, scale[:, None], shift[:, None], eps)


def gradient(
    dh: Tensor, dx_out: Tensor | None, x_out: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None,
    affine: bool, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return dx, dy, dscale, dshift, dgate for tensors [R, D] and tables [M, D], computed in float32 or float64.

    dx = dx' + LayerNorm's gradient, dy = gate dx, dgate = dx y summed over the rows of each table row. Without a gate
    dy equals dx and is returned as None.
    """
    groups = next((t.shape[0] for t in (gate, scale) if t is not None), 1)
    gain = torch.zeros(1, x_out.shape[-1], dtype=torch.float32, device=x_out.device) if scale is None else scale
    gain = gain - 1 if affine and scale is not None else gain  # norm_gradient multiplies by 1 + scale
    shape = (groups, -1, x_out.shape[-1])
    dx, dscale, dshift = norm_gradient(dh.reshape(shape), x_out.reshape(shape), gain[:, None], eps)
    if dx_out is not None:
        dx = dx + dx_out.reshape(shape)
    dy = dgate = None
    if gate is not None:
        assert y is not None, "y and its gate come together"
        dy = (dx * gate[:, None]).to(x_out.dtype).view_as(x_out)
        dgate = (dx * y.reshape(shape)).sum(1)
    return dx.to(x_out.dtype).view_as(x_out), dy, dscale.sum(1), dshift.sum(1), dgate
