"""Random draws that depend only on (seed, step, purpose): equal on every rank, and a resumed run needs no saved state.

A batch can be processed in equal shares, by several processes or one after the other. Inside `share`, draws are made
for the full batch and cut to the share, so that the numbers do not depend on how the batch is divided.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator(*keys: int) -> torch.Generator:
    """A CPU generator whose seed is a hash (splitmix64) of the keys."""
    state = 0
    for key in keys:
        state = (state + int(key) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)  # seeds are signed 64-bit numbers


_share = (0, 1)  # (index, count) of the share being processed


@contextmanager
def share(index: int, count: int) -> Iterator[None]:
    """Inside this context, all draws are for share `index` of `count` equal shares of every batch."""
    global _share
    before, _share = _share, (index, count)
    try:
        yield
    finally:
        _share = before


def rows(total: int) -> range:
    """The positions of the share's clips in a batch of `total` clips."""
    index, count = _share
    return range(index * total // count, (index + 1) * total // count)


def rand(size: int, gen: torch.Generator) -> Tensor:
    """Draw U(0, 1) [size] for the `size` clips of the share."""
    index, count = _share
    return torch.rand(size * count, generator=gen)[index * size : (index + 1) * size]


def randn(size: int, gen: torch.Generator) -> Tensor:
    """Draw N(0, 1) [size] for the `size` clips of the share."""
    index, count = _share
    return torch.randn(size * count, generator=gen)[index * size : (index + 1) * size]


def normal_like(x: Tensor, gen: torch.Generator) -> Tensor:
    """Draw N(0, 1) in the shape of x, on the CPU so that every device sees the same numbers."""
    index, count = _share
    size = len(x)
    return torch.randn((size * count, *x.shape[1:]), generator=gen)[index * size : (index + 1) * size].to(x)
