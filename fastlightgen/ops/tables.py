"""Shared code of the row-wise operators: modulation tables, argument checks, memory layouts for kernels.

A table is [M, D]. Row r of an operand with R rows uses row r // (R / M) of the table.
"""

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # flg_dtype in csrc/include/flg/check.h
WIDEST = 5120  # kWidest in csrc/include/flg/widths.h; the reference computes wider rows


def check_together(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless x is floating-point and all tensors share its device: kernels do not check addresses."""
    if not x.is_floating_point():
        raise ValueError(f"{op}: x got {x.dtype}, wanted a floating-point type; cast it")
    for name, t in others.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} got {t.device}, wanted {x.device}, where x is; move it")


def align(op: str, name: str, mod: Tensor, x: Tensor) -> Tensor:
    """Return a view of a modulation that has x's rank: [B, D] becomes [B, 1, .., D]; each axis must be full or 1."""
    rank = x.dim()
    view = mod.view(mod.shape[0], *[1] * (rank - 2), mod.shape[1]) if mod.dim() == 2 < rank else mod
    if view.dim() != rank or view.shape[-1] != x.shape[-1] or any(m not in (1, n) for m, n in zip(view.shape, x.shape)):
        got, wanted = tuple(mod.shape), tuple(x.shape)
        raise ValueError(f"{op}: {name} got {got}, wanted [B, D] or [B, 1, D], x {wanted}; reshape it")
    return view


def rows(mod: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Return a modulation of x's rank as a table [M, D], float32 or float64, and R / M, the rows of x per table row."""
    lead = list(x.shape[:-1])
    # The table covers the leading axes up to the last one along which the modulation varies.
    full = max([0, *(i + 1 for i, n in enumerate(lead) if mod.shape[i] == n != 1)])
    table = mod.flatten(full).expand(*lead[:full], -1).reshape(-1, x.shape[-1])
    return table.to(torch.float64 if x.dtype == torch.float64 else torch.float32), math.prod(lead[full:])


@overload
def tables(op: str, x: Tensor, **mods: Tensor) -> Sequence[Tensor]: ...
@overload
def tables(op: str, x: Tensor, **mods: Tensor | None) -> Sequence[Tensor | None]: ...
def tables(op: str, x: Tensor, **mods: Tensor | None) -> Sequence[Tensor | None]:
    """Convert modulations to tables with the same number of rows; None stays None.

    The conversion is differentiable, so an operator's backward pass handles tables only.
    """
    plain = (x.shape[0], x.shape[-1])
    if x.dim() > 2 and all(m is None or m.shape == plain for m in mods.values()):  # fast path: one row per sample
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return [m if m is None or m.dtype == wide else m.to(wide) for m in mods.values()]
    found = {name: rows(align(op, name, mod, x), x) for name, mod in mods.items() if mod is not None}
    # The finest table decides: coarser ones repeat their rows.
    shared = math.gcd(*(count for _, count in found.values()))
    full = {name: t if n == shared else t.repeat_interleave(n // shared, 0) for name, (t, n) in found.items()}
    return [full.get(name) for name in mods]


def kernel_takes(x: Tensor) -> bool:
    """Whether the kernels support x: its type, a width up to WIDEST that is a multiple of 8, 1 to 2^31 - 1 rows."""
    return x.dtype in DTYPES and x.shape[-1] % 8 == 0 and x.shape[-1] <= WIDEST and 0 < x.numel() < 2**31 * x.shape[-1]


@overload
def dense(x: Tensor) -> Tensor: ...
@overload
def dense(x: None) -> None: ...
def dense(x: Tensor | None) -> Tensor | None:
    """Return x contiguous and on a 16-byte boundary, because the kernels read 16 bytes at a time."""
    if x is None:
        return None
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


@overload
def dense_rows(table: Tensor) -> Tensor: ...
@overload
def dense_rows(table: None) -> None: ...
def dense_rows(table: Tensor | None) -> Tensor | None:
    """Return a table in float32 with dense rows on 16-byte boundaries; rows may have gaps between them."""
    if table is None or (table.dtype == torch.float32 and table.is_contiguous() and not table.data_ptr() % 16):
        return table  # D is a multiple of 8, so every row starts on a 16-byte boundary
    table = table.float()
    apart = table.stride(-1) == 1 and table.stride(0) % 4 == 0 and table.data_ptr() % 16 == 0
    return table if apart else table.clone(memory_format=torch.contiguous_format)
