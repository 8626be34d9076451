"""The fused operators: each has one specification (`reference.py`) and faster twins."""

from fastlightgen.ops.dispatch import describe
from fastlightgen.ops.dmd_gradient import dmd_gradient
from fastlightgen.ops.norm_modulate import norm_modulate

__all__ = ["describe", "dmd_gradient", "norm_modulate"]
