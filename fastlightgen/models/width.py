"""Width pruning: the saliency of rows of linear layers, and a network's tensors without the least salient ones.

Lightning Video, Sec. 2.1 and App. B. Shapes: X [n, d_in], the inputs of a linear layer for n tokens; W [d_out, d_in];
saliency [d_out], one number per row.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.base import Block, VideoDiT
from fastlightgen.models.streams import Prunable

Saliency = dict[str, Tensor]  # name of a linear layer of the network -> saliency of its rows, float64


def row_saliency(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Eq. 3, 13: I_i = w_i^T X^T X w_i = |X w_i|^2, the sum of squared pre-activations over all tokens; float64.

    The bias counts as the weight of one more input, which is 1 for every token.
    """
    y = F.linear(x, weight, bias).flatten(0, -2)
    wide = torch.promote_types(y.dtype, torch.float32)
    return torch.linalg.vector_norm(y, dim=0, dtype=wide).double().square()


@contextmanager
def watched(net: VideoDiT) -> Iterator[Saliency]:
    """Inside this context every walk adds the saliency of its tokens, for all rows that can be pruned."""
    found: Saliency = {}

    def add(name: str, layer: nn.Linear, module: nn.Module, args: tuple[Any, ...]) -> None:
        new = row_saliency(args[0].to(layer.weight.dtype), layer.weight, layer.bias)
        found[name] = found[name] + new if name in found else new

    hooks = []
    for prefix, block in blocks_of(net):
        for layer, reader in ((layer, reader) for part in block.prunable() for layer, reader in part.rows.items()):
            measure = partial(add, f"{prefix}.{layer}", linear_of(block, layer))
            hooks.append(block.get_submodule(reader).register_forward_pre_hook(measure))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(net: VideoDiT) -> Iterator[tuple[str, Block]]:
    """The name and the module of every block that width pruning knows."""
    names = {module: name for name, module in net.named_modules()}
    for block in net.blocks:
        assert isinstance(block, Block)
        yield names[block], block


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """A linear layer of a block."""
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def chosen(part: Prunable, saliency: Sequence[Tensor], left: int) -> Tensor:
    """Indices of the rows of the `left` most salient units of a part, in order.

    A unit's score is the sum over its rows and over the part's layers.
    """
    score = torch.stack([s.view(-1, part.size).sum(1) for s in saliency]).sum(0)
    units = score.argsort(descending=True, stable=True)[:left].sort().values
    return (units[:, None] * part.size + torch.arange(part.size)).flatten()


@dataclass
class Cut:
    """What is left of a tensor: some of its rows and columns (None: all), multiplied by a factor."""

    rows: Tensor | None = None
    columns: Tensor | None = None
    factor: float = 1.0

    def of(self, value: Tensor) -> Tensor:
        value = value if self.rows is None else value[self.rows]
        value = value if self.columns is None else value[:, self.columns]
        return value if self.factor == 1 else value * self.factor


def cuts(net: VideoDiT, saliency: Mapping[str, Tensor], heads: int, ffn_width: int) -> dict[str, Cut]:
    """Name of each parameter that changes when the network keeps `heads` heads and `ffn_width` neurons per block.

    The network itself may stand on the meta device.
    """
    out: dict[str, Cut] = {}
    for prefix, block in blocks_of(net):
        dropped: dict[str, list[Tensor]] = {}  # layer -> columns that go, of all parts that it reads
        for part in block.prunable():
            found = {layer: saliency[f"{prefix}.{layer}"].cpu() for layer in part.rows}
            rows = chosen(part, list(found.values()), heads if part.kind == "heads" else ffn_width)
            total = len(next(iter(found.values())))
            if len(rows) == total:
                continue
            for layer in part.rows:
                out |= {f"{prefix}.{layer}.{leaf}": Cut(rows) for leaf in ("weight", "bias")}
            for norm, layer in part.norms.items():
                # The norm divides by the root mean square of all rows. The factor keeps the scale of those that stay.
                factor = math.sqrt(found[layer][rows].mean().item() / found[layer].mean().item())
                out[f"{prefix}.{norm}.weight"] = Cut(rows, factor=factor)
            gone = torch.ones(total, dtype=torch.bool).index_fill(0, rows, False).nonzero().flatten()
            for layer, first in part.columns.items():
                dropped.setdefault(layer, []).append(first + gone)
        for layer, columns in dropped.items():
            left = torch.ones(linear_of(block, layer).weight.shape[1], dtype=torch.bool)
            left[torch.cat(columns)] = False
            out[f"{prefix}.{layer}.weight"] = Cut(columns=left.nonzero().flatten())
    return out
