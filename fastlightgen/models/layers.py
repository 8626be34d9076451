"""Layers that several families use: feed-forward, embedders, sinusoids of time. Module names follow diffusers' keys.

Shapes: B batch, L tokens, D hidden.
"""

import math
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.float8 import Float8Linear
from fastlightgen.ops import add_residual, linear_gate_residual, linear_gelu_tanh


class Gelu(nn.Module):
    """Linear, then GELU; a separate module so that the keys read `ffn.net.0.proj`."""

    def __init__(self, dim: int, inner: int, approximate: str = "tanh"):
        super().__init__()
        self.proj, self.approximate = nn.Linear(dim, inner), approximate

    def forward(self, x: Tensor) -> Tensor:
        if self.approximate == "tanh":
            return gelu_of(self.proj, x)
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Linear, GELU, Linear under the key names of diffusers."""

    def __init__(self, dim: int, inner: int, out: int, approximate: str = "tanh"):
        super().__init__()
        # Index 1 is a dropout in diffusers; Identity keeps the key `net.2`.
        self.net = nn.ModuleList([Gelu(dim, inner, approximate), nn.Identity(), nn.Linear(inner, out)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))

    def onto(self, c: Tensor, gate: Tensor, x: Tensor) -> Tensor:
        """Compute c + gate feed_forward(x)."""
        return linear_onto(self.net[2], c, gate, self.net[0](x))


def plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the layer now is a product with its weight: it has no adapters and does not compute in float8."""
    return isinstance(layer, nn.Linear) and (torch.is_grad_enabled() or not isinstance(layer, Float8Linear))


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute GELU(layer(x)) by the tanh formula: in the matmul's epilogue where that kernel is used."""
    if plain(layer):
        return linear_gelu_tanh(x, layer.weight, layer.bias)
    return F.gelu(layer(x), approximate="tanh")


def linear_onto(layer: nn.Module, c: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """Compute c + gate layer(x): in the matmul's epilogue where that kernel is used."""
    if plain(layer):
        return linear_gate_residual(c, gate, x, layer.weight, layer.bias)
    return add_residual(c, layer(x), gate)


class Embedder(nn.Module):
    """The two linear layers of an embedding under the key names of diffusers; the caller applies the activation."""

    def __init__(self, dim_in: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of 1000 t [B] -> float32 [B, width]."""
    half = width // 2
    freq = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = 1000 * t[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], -1)
