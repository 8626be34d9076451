"""The deferred residual: x + gate y of the block that ran last, fused with the norm of whatever runs next."""

from fastlightgen.ops.gate_residual_norm_modulate.reference import add_residual, gate_residual_norm_modulate

__all__ = ["add_residual", "gate_residual_norm_modulate"]
