"""One pass over stored tensors: their checksums, whether their numbers are finite, and a copy.

Memory decides how long this takes. The compiled module reads each byte from memory once, also where it copies. Torch
takes two passes over pieces that stay in the processor's cache, and then copies. A copy in another type comes after.
"""

import importlib
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK, PIECE = 4096, 1 << 22  # bytes; PIECE is for each thread
# The exponent bits of each number in 64 bits. All of them are set in numbers that are not finite.
EXPONENT = {
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000_7F80_0000,
    torch.float16: 0x7C00_7C00_7C00_7C00,
    torch.bfloat16: 0x7F80_7F80_7F80_7F80,
}


@lru_cache
def compiled() -> Any:
    """The compiled function, or None where the module was not built."""
    try:
        return getattr(importlib.import_module("fastlightgen._C"), "read_tensors", None)
    except ImportError:
        return None


def read_once(value: Tensor, into: Tensor | None = None) -> tuple[int, bool]:
    """Return the checksum of a tensor on the CPU, and whether all of its numbers are finite.

    `into`: a contiguous tensor of the same shape on the CPU, perhaps of another type, that gets the values.
    """
    return read_all([(value, into)])[0]


def read_all(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[int, bool]]:
    """`read_once` for several tensors, which the compiled function reads together."""
    for value, into in pairs:
        if into is not None and (into.shape != value.shape or into.device.type != "cpu"):
            raise ValueError(f"a copy of {tuple(value.shape)} into {tuple(into.shape)} on {into.device}")
    values = [value.detach().contiguous().reshape(-1) for value, _ in pairs]
    targets = [None if into is None else into.view(-1) for _, into in pairs]
    if not compiled():
        out = [_in_pieces(value) for value in values]
    else:  # it copies what keeps its type
        alike = [t if t is not None and t.dtype == v.dtype else None for v, t in zip(values, targets, strict=True)]
        out = _compiled(list(zip(values, alike, strict=True)))
        targets = [t if one is None else None for t, one in zip(targets, alike, strict=True)]
    for value, target in zip(values, targets, strict=True):
        if target is not None:
            target.copy_(value)
    return out


def _compiled(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> list[tuple[int, bool]]:
    """Read flat tensors with the compiled function, and the bytes behind their last blocks with torch."""
    counts = [value.numel() * value.element_size() // BLOCK for value, _ in pairs]
    sums = [torch.empty(count, dtype=torch.int64, device="cpu") for count in counts]
    jobs = [
        (v.data_ptr(), s.data_ptr(), count, EXPONENT.get(v.dtype, 0), 0 if into is None else into.data_ptr())
        for (v, into), s, count in zip(pairs, sums, counts, strict=True)
    ]
    out = []
    for (value, into), own, count, finite in zip(
        pairs, sums, counts, compiled()(jobs, torch.get_num_threads()), strict=True
    ):
        total, rest = zlib.crc32(own.numpy().data), count * BLOCK // value.element_size()
        if rest < len(value):
            total = zlib.crc32(value[rest:].view(torch.uint8).numpy().data, total)
            finite = finite and all_finite(value[rest:])
            if into is not None:
                into[rest:].copy_(value[rest:])
        out.append((total, finite))
    return out


def _in_pieces(value: Tensor) -> tuple[int, bool]:
    """Read a flat tensor with torch."""
    total, finite, count = 0, True, PIECE // value.element_size() * torch.get_num_threads()
    for piece in value.split(count):
        total = added(_aligned(piece.view(torch.uint8)), total)
        finite &= all_finite(piece)
    return total, finite


def added(data: Tensor, before: int) -> int:
    """Continue the checksum `before` with more bytes; all but the last ones are whole blocks."""
    whole_blocks = len(data) // BLOCK * BLOCK
    sums = data[:whole_blocks].view(torch.int64).view(-1, BLOCK // 8).sum(1)
    return zlib.crc32(data[whole_blocks:].numpy().data, zlib.crc32(sums.numpy().data, before))


def all_finite(value: Tensor) -> bool:
    """Whether all numbers are finite. One that is not makes the sum so, too; the sum of finite ones may overflow."""
    if not value.is_floating_point() or not value.numel():
        return True
    return math.isfinite(value.sum()) or all(map(math.isfinite, value.aminmax()))


def _aligned(data: Tensor) -> Tensor:
    """The same bytes where 64-bit integers may stand; a mapped tensor may begin anywhere."""
    return data.clone() if data.storage_offset() % 8 or data.data_ptr() % 8 else data
