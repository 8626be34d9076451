"""Exponential moving average of a network's trainable weights."""

import torch
from torch import nn

from fastlightgen.engine.shards import is_sharded


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, rate: float) -> None:
    """average <- average + rate (net - average). Under ZeRO-3 each rank updates its own partition."""
    for a, p in zip(average.parameters(), net.parameters(), strict=True):
        if a.numel():  # 0 for a parameter that ZeRO-3 keeps as a partition only
            a.lerp_(p, rate)
        if is_sharded(a) and is_sharded(p):
            a.ds_tensor.lerp_(p.ds_tensor, rate)


def averaging_rate(decay: float, n: int) -> float:
    """Return the rate of the n-th averaged update, max(1 - decay, 1 / (n + 1)).

    The first updates get equal weights, so that the start has no bias. Before averaging starts (n <= 0) the rate is 1.
    """
    return 1.0 if n <= 0 else max(1 - decay, 1 / (n + 1))


class Ema:
    """The exponential moving average of a network's trainable weights; a plain copy of them up to update `start`."""

    def __init__(self, net: nn.Module, decay: float, start: int):
        self.decay, self.start, self.count = decay, start, 0
        self.shadow = {k: v.detach().clone() for k, v in net.named_parameters() if v.requires_grad}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """shadow <- decay shadow + (1 - decay) weights."""
        self.count += 1
        rate = averaging_rate(self.decay, self.count - self.start)
        for name, p in net.named_parameters():
            if name in self.shadow:
                self.shadow[name].lerp_(p, rate)

    @torch.no_grad()
    def swap(self, net: nn.Module) -> None:
        """Exchange the average and the network's weights."""
        for name, p in net.named_parameters():
            if name in self.shadow:
                weights = p.clone()
                p.copy_(self.shadow[name])
                self.shadow[name].copy_(weights)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Put the averaged weights into the network."""
        for name, p in net.named_parameters():
            if name in self.shadow:
                p.copy_(self.shadow[name])
