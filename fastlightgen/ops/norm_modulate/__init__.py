"""norm_modulate(x, scale, shift) = LayerNorm(x) (1 + scale) + shift: the adaptive norm before a branch of a block."""

import importlib
import math

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.norm_modulate import reference


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without affine over the last axis of x [B, ..., D], then * (1 + scale) + shift; returns x's dtype.

    scale and shift: [B, D], one row per sample, or x's rank with every axis full or 1 ([B, 1, D], [B, N, D]).
    """
    scale, shift = _align("scale", scale, x), _align("shift", shift, x)
    # Eager CPU calls skip the dispatcher: torch's own LayerNorm backward is 4 times faster than _backward.
    if x.is_cpu and not torch.compiler.is_compiling() and dispatch.backend_for("cpu") == "reference":
        return reference.norm_modulate(x, scale, shift, eps)
    return torch.ops.fastlightgen.norm_modulate(x, scale, shift, eps)


def _align(name: str, mod: Tensor, x: Tensor) -> Tensor:
    """A view of scale or shift with x's rank."""
    rank = x.dim()
    view = mod.view(mod.shape[0], *[1] * (rank - 2), mod.shape[1]) if mod.dim() == 2 < rank else mod
    if view.dim() != rank or view.shape[-1] != x.shape[-1] or any(m not in (1, n) for m, n in zip(view.shape, x.shape)):
        raise ValueError(
            f"norm_modulate: {name} got {tuple(mod.shape)}, wanted [B, D] or [B, 1, D], x {tuple(x.shape)}; reshape it"
        )
    return view


def _rows(mod: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """scale or shift as a float32 table [M, D] and the number of consecutive rows of x that share one of its rows."""
    lead = list(x.shape[:-1])
    full = max(
        (i + 1 for i, n in enumerate(lead) if mod.shape[i] == n != 1), default=0
    )  # axes up to here have own rows
    table = mod[(..., *[0] * (len(lead) - full), slice(None))].expand(*lead[:full], -1).reshape(-1, x.shape[-1]).float()
    if table.stride(-1) != 1 or table.stride(0) % 4 or table.data_ptr() % 16:
        table = table.clone(memory_format=torch.contiguous_format)  # the kernels read 16 bytes at a time
    return table, math.prod(lead[full:])


def _forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """What runs outside autograd: a kernel, or the reference for what kernels do not take (float64, odd widths)."""
    backend = dispatch.backend_for(x.device.type)
    kernel_takes = x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.shape[-1] % 8 == 0 and x.numel() > 0
    if backend == "reference" or not kernel_takes:
        return reference.norm_modulate(x, scale, shift, eps).contiguous()
    flat = x.contiguous().view(-1, x.shape[-1])
    flat = flat.clone() if flat.data_ptr() % 16 else flat
    (scale, scale_rows), (shift, shift_rows) = _rows(scale, x), _rows(shift, x)
    if scale_rows != shift_rows:  # one table per call has to serve both: repeat the shorter one
        few = math.gcd(scale_rows, shift_rows)
        scale, shift = scale.repeat_interleave(scale_rows // few, 0), shift.repeat_interleave(shift_rows // few, 0)
        scale_rows = few
    out = torch.empty_like(flat)
    importlib.import_module(f"{__name__}.{backend}").forward(out, flat, scale, shift, scale_rows, eps)
    return out.view(x.shape)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    x, scale, shift, ctx.eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.shift = (shift.shape, shift.dtype)


def _backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, scale = ctx.saved_tensors
    shape, dtype = ctx.shift
    dx, dscale, dshift = reference.gradient(dh, x, scale, ctx.eps)
    return dx.to(x.dtype), dscale.sum_to_size(scale.shape).to(scale.dtype), dshift.sum_to_size(shape).to(dtype), None


def _fake(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


_NAME = "fastlightgen::norm_modulate"
dispatch.LIB.define("norm_modulate(Tensor x, Tensor scale, Tensor shift, float eps) -> Tensor")
for _device in ("CPU", "CUDA"):
    dispatch.LIB.impl("norm_modulate", _forward, _device)
torch.library.register_fake(_NAME, _fake, lib=dispatch.LIB)
torch.library.register_autograd(_NAME, _backward, setup_context=_setup_context, lib=dispatch.LIB)
