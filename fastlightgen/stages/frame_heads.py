"""A discriminator over space and time: heads on the hidden states of a frozen video network (VDMini, Sec. 3.3; SF-V).

At each of some blocks a spatial head looks at every frame alone, with 2-D convolutions, and a temporal head at every
place alone, with 1-D convolutions along the frames. Both give a logit for every token; a head sees one token and its
neighbours. Shapes: hidden states h [B, L, D] with L = F H W tokens, frame slowest; logits [heads, B, L].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.base import Features, VideoDiT
from fastlightgen.models.cost import Network, Saved, Work, biased, linear
from fastlightgen.models.families import FAMILIES
from fastlightgen.parallel.sequence import SequenceGroup
from fastlightgen.planner.step import Head as HeadCost
from fastlightgen.stages.discriminator import NAME, WIDTH

KERNEL = 3  # tokens along each axis that a convolution reads
Grid = tuple[int, int, int]  # tokens along the frames, rows and columns


def grid_of(net: VideoDiT, x: Tensor) -> Grid:
    """The tokens of a latent [B, C, F, H, W]."""
    frames, rows, columns = x.shape[2:]
    return FAMILIES[net.family].geometry.grid((frames, rows, columns))


def arranged(h: Tensor, grid: Grid, sequence: SequenceGroup | None) -> Tensor:
    """Tokens [B, L, D] as [B, F, H, W, D]. Where processes share a clip's tokens, those of each follow each other."""
    if sequence is None:
        return h.unflatten(1, grid)
    cut = sequence.cut(grid)
    sizes = [[n if axis == cut.axis else g for axis, g in enumerate(grid)] for n in cut.sizes]
    parts = zip(h.split(cut.tokens, 1), sizes, strict=True)
    return torch.cat([part.unflatten(1, size) for part, size in parts], cut.axis + 1)


def read_blocks(num_blocks: int, every: int) -> list[int]:
    """Every `every`-th block, so that the last one read is the last such block; of a shallow network the last block."""
    return list(range(every - 1, num_blocks, every)) or [num_blocks - 1]


class Convolutions(nn.Module):
    """A convolution, a norm of each sample, SiLU, and a logit for every place: [N, width, ...] -> [N, 1, ...]."""

    def __init__(self, width: int, axes: int, gen: torch.Generator):
        super().__init__()
        kind = nn.Conv2d if axes == 2 else nn.Conv1d
        self.conv, self.out = kind(width, width, KERNEL, padding=KERNEL // 2), kind(width, 1, 1)
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        draw(self, gen)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(self.conv(x))))


class FrameHead(nn.Module):
    """The spatial and the temporal head of one block, on the same narrow features."""

    def __init__(self, dim: int, gen: torch.Generator):
        super().__init__()
        width = min(dim, WIDTH)
        self.norm, self.token = nn.LayerNorm(dim), nn.Linear(dim, width)  # blocks have states of different scales
        draw(self, gen)
        self.spatial, self.temporal = Convolutions(width, 2, gen), Convolutions(width, 1, gen)

    def forward(self, h: Tensor, grid: Grid, sequence: SequenceGroup | None) -> list[Tensor]:
        """Return two logits [B, L] for every token: that of its frame, and that of its place along the frames."""
        x = arranged(self.token(self.norm(h)), grid, sequence)
        space = self.spatial(x.flatten(0, 1).permute(0, 3, 1, 2))  # [B F, 1, H, W]
        time = self.temporal(x.permute(0, 2, 3, 4, 1).flatten(0, 2))  # [B H W, 1, F]
        time = time.view(len(h), -1, grid[0]).transpose(1, 2)
        return [space.reshape(len(h), -1), time.reshape(len(h), -1)]


class FrameDiscriminator(nn.Module):
    """A spatial and a temporal head on each of some blocks of a frozen network."""

    def __init__(self, blocks: list[int], dim: int, gen: torch.Generator):
        super().__init__()
        self.blocks, self.heads = blocks, nn.ModuleList([FrameHead(dim, gen) for _ in blocks])
        self.depth = blocks[-1] + 1  # of the network as far as it is read

    def forward(self, features: Features, grid: Grid, sequence: SequenceGroup | None = None) -> Tensor:
        """`sequence`: the processes that share the tokens of the network's walks."""
        pairs = [head(features[i], grid, sequence) for head, i in zip(self.heads, self.blocks, strict=True)]
        logits = torch.stack([logit for pair in pairs for logit in pair])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def draw(module: nn.Module, gen: torch.Generator) -> None:
    """Draw the weights of a module's own layers from `gen` alone, so that all ranks have the same."""
    for layer in module.children():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and layer.bias is not None:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=gen) / layer.weight[0].numel() ** 0.5)
            layer.bias.zero_()


def attach(net: VideoDiT, every: int, gen: torch.Generator) -> FrameDiscriminator:
    """Give a frozen network a discriminator, as a part of it: a sharded engine shards it with the network."""
    made = FrameDiscriminator(read_blocks(net.num_blocks, every), net.cfg.dim, gen).to(net.device)
    net.add_module(NAME, made)
    return made


def cost(net: Network, every: int, kept_anyway: bool) -> HeadCost:
    """The cost of a discriminator for the planner. Every process reads all tokens of its clips.

    `kept_anyway`: the hidden states that it reads are those that checkpointing keeps. A norm keeps its input, a linear
    layer its input where it trains, a convolution its input always.
    """
    blocks, dim, width = len(read_blocks(len(net.blocks), every)), net.width, min(net.width, WIDTH)
    tokens = math.prod(FAMILIES[net.family].geometry.grid(net.latent))
    taps = KERNEL**2 + KERNEL  # of both convolutions
    convolutions = taps * width * width + 2 * (3 * width) + 2 * (width + 1)  # with biases, norms, and the logits
    return HeadCost(
        params=blocks * (2 * dim + biased((dim, width)) + convolutions),
        work=Work(blocks * linear(tokens, (dim, width), (width, taps * width), (width, 2))),
        # Before and after the norm; the narrow features in the order of each head, before and after its norm and after
        # SiLU.
        saved=Saved(blocks * tokens * (2 * dim + 8 * width), 0),
        constant=Saved(blocks * tokens * (dim * (not kept_anyway) + 8 * width), 0),
    )
