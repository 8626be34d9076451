"""The specification of linear_gate_residual."""

import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops.gate_residual_norm_modulate.reference import add_residual


def linear_gate_residual(c: Tensor, gate: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """c + gate (x weight^T + bias)."""
    return add_residual(c, F.linear(x, weight, bias), gate)
