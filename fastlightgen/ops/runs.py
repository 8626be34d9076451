"""How the Triton kernels cut rows into runs, and other launch arithmetic that they share."""

import contextlib

import torch
from torch import Tensor


def split(rows_per_mod: int, groups: int, x: Tensor) -> tuple[int, int]:
    """Runs per modulation row and rows per run: about four runs per processor, none empty."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    wanted = min(rows_per_mod, -(-4 * processors // groups))
    length = -(-rows_per_mod // wanted)
    return -(-rows_per_mod // length), length


def warps(block: int) -> int:
    """8192 lanes (D = 5120) spill with fewer than 8 warps."""
    return min(16, max(4, block // 512))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; under its interpreter there is none."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
