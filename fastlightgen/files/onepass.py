"""One pass over a stored tensor: its checksum, and whether its numbers are finite; then a copy.

Memory decides how long this takes. The compiled module touches each byte once; torch takes two passes, over pieces that
stay in the processor's cache. The copy comes after: writing to fresh memory in the same loop was slower.
"""

import importlib
import math
import zlib
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
        return getattr(importlib.import_module("fastlightgen._C"), "read_blocks", None)
    except ImportError:
        return None


def read_once(value: Tensor, into: Tensor | None = None) -> tuple[int, bool]:
    """Return the checksum of a tensor on the CPU, and whether all of its numbers are finite.

    `into`: a tensor of the same shape on the CPU, perhaps of another type, that gets the values.
    """
    if not value.numel():
        return 0, True
    value = value.detach().contiguous().reshape(-1)
    total, finite = (_compiled if compiled() else _in_pieces)(value)
    if into is not None:
        into.view(-1).copy_(value)
    return total, finite


def _compiled(value: Tensor) -> tuple[int, bool]:
    """Read a flat tensor with the compiled function, and the bytes behind its last block with torch."""
    data, blocks = value.view(torch.uint8), value.numel() * value.element_size() // BLOCK
    sums = torch.empty(blocks, dtype=torch.int64)
    how = EXPONENT.get(value.dtype, 0), torch.get_num_threads()
    finite = compiled()(data.data_ptr(), sums.data_ptr(), blocks, *how)
    total = zlib.crc32(sums.numpy().data)
    if (rest := blocks * BLOCK // value.element_size()) == len(value):
        return total, finite
    return zlib.crc32(data[blocks * BLOCK :].numpy().data, total), finite and all_finite(value[rest:])


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
