"""A discriminator that reads the critic's hidden states, and its losses (DMD2, arXiv 2405.14867, Sec. 4.3).

The critic is a video network of its own, so that a few small heads on its hidden states are enough. It sees noised
clips and their prompts. Shapes: hidden states h [B, L, D]; logits [heads, B], positive for real clips.
"""

import math
from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.engine.roles import Values
from fastlightgen.models.base import Features, VideoDiT
from fastlightgen.models.cost import Network, Saved, Work, biased, linear
from fastlightgen.models.families import FAMILIES
from fastlightgen.planner.step import Head as HeadCost

WIDTH = 256  # hidden units of a head, at most D
NAME = "discriminator"  # the submodule of the critic that holds the heads; a sharded engine shards it with the critic


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake)) with D = sigmoid(logit), as softplus; the mean over heads and clips."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """-log D(fake), the student's side: its clips should look real."""
    return F.softplus(-fake).mean()


class Head(nn.Module):
    """One logit per clip from its hidden states: a layer for each token, the mean over tokens, a weighted sum."""

    def __init__(self, dim: int, gen: torch.Generator):
        super().__init__()
        self.norm = nn.LayerNorm(dim)  # blocks have hidden states of different scales
        self.token, self.out = nn.Linear(dim, min(dim, WIDTH)), nn.Linear(min(dim, WIDTH), 1)
        with torch.no_grad():  # drawn from `gen` alone, so that all ranks have the same
            for layer in (self.token, self.out):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=gen) / layer.in_features**0.5)
                layer.bias.zero_()

    def forward(self, h: Tensor) -> Tensor:
        return self.out(F.silu(self.token(self.norm(h))).mean(1)).squeeze(1)


class Discriminator(nn.Module):
    """A head on each of some blocks of the critic."""

    def __init__(self, blocks: list[int], dim: int, gen: torch.Generator):
        super().__init__()
        self.blocks, self.heads = blocks, nn.ModuleList([Head(dim, gen) for _ in blocks])

    def forward(self, features: Features) -> Tensor:
        logits = torch.stack([head(features[i]) for head, i in zip(self.heads, self.blocks, strict=True)])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def read_blocks(num_blocks: int, count: int) -> list[int]:
    """The blocks whose hidden states are read: the last one, and others at equal distances over the second half."""
    steps = 2 * max(1, count - 1)
    return sorted({num_blocks - 1 - k * num_blocks // steps for k in range(min(count, num_blocks))})


def attach(critic: VideoDiT, count: int, gen: torch.Generator) -> Discriminator:
    """Give a critic a discriminator, as a part of it."""
    made = Discriminator(read_blocks(critic.num_blocks, count), critic.cfg.dim, gen).to(critic.device)
    critic.add_module(NAME, made)
    return made


def with_heads(values: Values | None, made: Discriminator | None) -> Values | None:
    """Add the heads' first values to the reader of the critic's float32 values (`Role.file_values`)."""
    if values is None or made is None:
        return values
    first = {f"{NAME}.{key}": p.detach().to("cpu", torch.float32, copy=True) for key, p in made.named_parameters()}

    def read() -> Iterator[tuple[str, Tensor]]:
        return chain(values(), first.items())

    return read


def cost(net: Network, num_blocks: int, count: int) -> HeadCost:
    """The cost of a discriminator for the planner. Every process reads all tokens of its clips."""
    heads, dim, width = len(read_blocks(num_blocks, count)), net.width, min(net.width, WIDTH)
    tokens = math.prod(FAMILIES[net.family].geometry.grid(net.latent))
    return HeadCost(
        params=heads * (2 * dim + biased((dim, width), (width, 1))),
        work=Work(heads * (linear(tokens, (dim, width)) + linear(1, (width, 1)))),
        saved=Saved(heads * tokens * (2 * dim + 2 * width), 0),  # before and after the norm, before and after SiLU
    )
