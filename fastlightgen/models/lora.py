"""Low-rank adapters on the linear layers of the blocks: one frozen network also serves as critic, or as student."""

import copy
from collections.abc import Iterator, Sequence
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


def lora_copy(net: VideoDiT, path: Sequence[int], rank: int, gen: torch.Generator) -> tuple[VideoDiT, nn.ParameterDict]:
    """Copy a network's modules but not its weights, and attach adapters to the copy that are always on.

    Both networks are frozen. The copy has the blocks `path`. It shares the linear layers themselves, which may keep
    float8 copies of their weights.
    """
    shared = [*net.parameters(), *net.buffers(), *(m for m in net.modules() if isinstance(m, nn.Linear))]
    copied = copy.deepcopy(net, {id(value): value for value in shared})
    return copied.prune(path), attach_always(copied, rank, gen)


def attach_always(net: VideoDiT, rank: int, gen: torch.Generator) -> nn.ParameterDict:
    """Attach adapters that are always on."""
    adapters = attach_lora(net, rank, gen)
    for module in net.modules():
        if isinstance(module, LoraLinear):
            module.on = 1.0
    return adapters


def plain_parts(model: VideoDiT) -> dict[str, tuple[Tensor, ...]]:
    """The tensors of `merged` by the names of the network without adapters: (weight,) or (weight, down, up)."""
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    parts: dict[str, tuple[Tensor, ...]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        parent, _, last = key.rpartition(".")
        layer = parent.removesuffix(".base")
        if layer not in wrapped:
            parts[key] = (value,)
        elif layer != parent:  # of the layer under the adapter; the adapter's own tensors come with its weight
            own = wrapped[layer]
            parts[f"{layer}.{last}"] = (value, own.down, own.up) if last == "weight" else (value,)
    return parts


def merged(parts: Sequence[Tensor]) -> Tensor:
    """A weight as it is, or with its adapter: W + B A, computed in float32 at least."""
    weight, *adapter = parts
    if not adapter:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    down, up = adapter
    return weight.to(wide) + up.to(wide) @ down.to(wide)


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
