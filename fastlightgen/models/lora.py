"""Low-rank adapters on the linear layers of the blocks, so that one frozen network also serves as the fake (critic)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastlightgen.models.base import VideoDiT
from fastlightgen.models.recompute import Switched


class LoraLinear(nn.Module, Switched):
    """y = W x + b + s B A x at the strength s (`on`; 0: off). B (`up`) starts at zero, so that it changes nothing."""

    def __init__(self, base: nn.Linear, rank: int, gen: torch.Generator):
        super().__init__()
        self.base, self.on = base, 0.0
        down = torch.randn(rank, base.in_features, generator=gen) / base.in_features**0.5
        self.down = nn.Parameter(down.to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        change = x @ self.down.mT @ self.up.mT
        return y + (change if self.on == 1 else self.on * change)


def attach_lora(model: VideoDiT, rank: int, gen: torch.Generator) -> nn.ParameterDict:
    """Freeze `model`, wrap every linear layer of its blocks, and return the adapters' parameters by name."""
    model.requires_grad_(False)
    linears = [(name, m) for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)]
    adapters = nn.ParameterDict()
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        wrapped = LoraLinear(linear, rank, gen)
        setattr(model.blocks.get_submodule(parent), child, wrapped)
        key = name.replace(".", "_")
        adapters[f"{key}_down"], adapters[f"{key}_up"] = wrapped.down, wrapped.up
    return adapters


@contextmanager
def lora_on(model: VideoDiT, strength: float = 1.0) -> Iterator[None]:
    """Give the adapters a strength inside this context (1: as they are trained), and restore the former at its end."""
    wrapped = [m for m in model.modules() if isinstance(m, LoraLinear)]
    before = [m.on for m in wrapped]
    for m in wrapped:
        m.on = strength
    try:
        yield
    finally:
        for m, on in zip(wrapped, before, strict=True):
            m.on = on
