"""The fused operators. Each has a plain PyTorch specification (`reference.py`) and faster kernels beside it."""

from fastlightgen.ops.attention import attend
from fastlightgen.ops.dispatch import describe
from fastlightgen.ops.dmd_gradient import dmd_gradient
from fastlightgen.ops.gate_residual_norm_modulate import add_residual, gate_residual_norm_modulate
from fastlightgen.ops.linear_gate_residual import linear_gate_residual
from fastlightgen.ops.linear_gelu_tanh import linear_gelu_tanh
from fastlightgen.ops.norm_modulate import norm_modulate
from fastlightgen.ops.qk_norm_rope import Rope, qk_norm_rope, rope_factors

__all__ = [
    "Rope",
    "add_residual",
    "attend",
    "describe",
    "dmd_gradient",
    "gate_residual_norm_modulate",
    "linear_gate_residual",
    "linear_gelu_tanh",
    "norm_modulate",
    "qk_norm_rope",
    "rope_factors",
]
