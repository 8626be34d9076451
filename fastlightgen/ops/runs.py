"""Launch arithmetic shared by the Triton kernels: runs of rows, warps, the current device."""

import contextlib

import torch
from torch import Tensor


def split(rows_per_mod: int, groups: int, x: Tensor) -> tuple[int, int]:
    """Return (runs per modulation row, rows per run) for about four runs per multiprocessor, none empty.

    `groups` is the number of modulation rows, `rows_per_mod` the rows of x that share one.
    """
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    wanted = min(rows_per_mod, -(-4 * processors // groups))
    length = -(-rows_per_mod // wanted)
    return -(-rows_per_mod // length), length


def warps(block: int) -> int:
    """Warps for a block of so many elements; D = 5120 (a block of 8192) spills registers with fewer than 8."""
    return min(16, max(4, block // 512))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device current, because Triton launches there; a no-op for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
