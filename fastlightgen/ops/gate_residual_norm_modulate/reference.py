"""The specification of gate_residual_norm_modulate."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops.norm_modulate import norm_modulate


def add_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate y (x + y without a gate), summed in float32 or better and rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if gate is None:
        return (x.to(wide) + y.to(wide)).to(x.dtype)
    return torch.addcmul(x.to(wide), y.to(wide), gate.to(wide)[:, None]).to(x.dtype)


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
    """(x', h): x' = x + gate y, then h = LayerNorm(x') (1 + scale) + shift, or the affine LayerNorm(x') weight + bias.

    x, y [B, L, D]; gate, scale, shift [B, D]; without y nothing is pending and x' is x, without gate it is x + y.
    The norm sees the rounded x'.
    """
    if y is not None:
        x = add_residual(x, y, gate)
    if scale is None:
        return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x, norm_modulate(x, scale, shift, eps)
