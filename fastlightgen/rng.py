"""Random draws as a function of (seed, step, purpose): nothing to save on resume, and alike on every rank."""

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


def normal_like(x: Tensor, gen: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape of x, drawn on the CPU so that every device sees the same."""
    return torch.randn(x.shape, generator=gen).to(x)
