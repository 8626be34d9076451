"""Float8 for what carries no gradient (`fp8=frozen`): linear layers of the blocks, under no_grad alone.

The walk runs streams without gradient under no_grad, so the gradient mode decides. What such streams share with streams
that carry gradient is computed once, with gradient, and keeps its type. So does the rest of the network:

- the layers outside the blocks: patches, text, image tokens and time on their way in, the head on its way out. They are
  about 1% of the operations, and their errors enter every block or the prediction itself;
- HunyuanVideo's modulation layers inside the blocks: one row per clip, and an error of a scale or gate is an error of
  all its tokens. Wan's modulation stands outside the blocks;
- low-rank adapters: their products are small, and their weights change with every update;
- layers whose sizes are not multiples of 16, which torch's scaled product does not take.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from fastlightgen.models.base import VideoDiT
from fastlightgen.ops import float8

Net = TypeVar("Net", bound=VideoDiT)


class Float8Linear(nn.Linear):
    """A linear layer that computes in float8 under no_grad. It has the parameters of the layer that it replaces.

    `keeps`: keep the float8 weight until the weight changes. Otherwise it is made anew in every call.
    """

    made: tuple[Tensor, Tensor] | None = None  # the float8 weight and its scales
    made_from: tuple[int, int] | None = None  # the weight that it was made from; see `weight_now`

    def __init__(self, layer: nn.Linear, keeps: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.keeps = layer.in_features, layer.out_features, keeps
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return float8.linear(x, *self.quantised(), self.bias, dtype)

    def quantised(self) -> tuple[Tensor, Tensor]:
        """The weight in float8 and its scales."""
        if not self.keeps:
            return float8.quantised(self.weight)
        if self.made is None or self.made_from != self.weight_now():
            self.made, self.made_from = float8.quantised(self.weight), self.weight_now()
        return self.made

    def weight_now(self) -> tuple[int, int]:
        """Different after every change of the weight in place, and for another tensor in its place."""
        return self.weight._version, self.weight.data_ptr()


def in_float8(net: Net, keeps: bool = True) -> Net:
    """Let the linear layers of a network's blocks compute in float8 what carries no gradient. Return the network.

    `keeps`: see Float8Linear; False for weights that a sharding engine gathers for each call.
    """
    for parent in list(net.blocks.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and getattr(parent, "takes_float8", True):
                if float8.takes(layer.out_features, layer.in_features):
                    setattr(parent, name, Float8Linear(layer, keeps))
    return net
