"""Random draws as a function of (seed, step, purpose): nothing to save on resume, and alike on every rank.

A batch may be worked on in equal shares, by several processes or one after the other. Inside `share` a draw per clip
is made for the whole batch and cut to the share, so that the numbers do not depend on how a batch is divided.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on the keys alone (splitmix64 over them)."""
    state = 0
    for key in keys:
        state = (state + int(key) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


_share = (0, 1)  # which share of a batch is being worked on, of how many


@contextmanager
def share(index: int, count: int) -> Iterator[None]:
    """Work on one of `count` equal shares of every batch."""
    global _share
    before, _share = _share, (index, count)
    try:
        yield
    finally:
        _share = before


def rows(total: int) -> range:
    """The clips of a batch of `total` that belong to the share."""
    index, count = _share
    return range(index * total // count, (index + 1) * total // count)


def rand(size: int, gen: torch.Generator) -> Tensor:
    """U(0, 1) for the `size` clips of the share."""
    index, count = _share
    return torch.rand(size * count, generator=gen)[index * size : (index + 1) * size]


def randn(size: int, gen: torch.Generator) -> Tensor:
    """N(0, 1) for the `size` clips of the share."""
    index, count = _share
    return torch.randn(size * count, generator=gen)[index * size : (index + 1) * size]


def normal_like(x: Tensor, gen: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape of x, drawn on the CPU so that every device sees the same."""
    index, count = _share
    size = len(x)
    return torch.randn((size * count, *x.shape[1:]), generator=gen)[index * size : (index + 1) * size].to(x)
