"""The specification of norm_modulate, which also computes it for CPU tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, computed in float32 (float64 stays float64) and rounded once to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    n = F.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    # Multiply, then add in place: as fast as addcmul, whose fused multiply-add would differ from diffusers by one bit.
    return (n * (1 + scale.to(wide))).add_(shift.to(wide)).to(x.dtype)


def gradient(dh: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """With n = LayerNorm(x) and g = dh (1 + scale): dx = rstd (g - mean g - n mean(g n)), dscale = dh n, dshift = dh.

    dscale and dshift have x's shape; the caller sums them to the shapes of scale and shift.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, dh = x.to(wide), dh.to(wide)
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    rstd = (var + eps).rsqrt()
    n = (x - mean) * rstd
    g = dh * (1 + scale.to(wide))
    dx = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dx, dh * n, dh
