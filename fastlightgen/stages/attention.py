"""The attention between frames of every head, and heads that are silenced by zeroed output weights.

Shapes: x_t [B, C, F, H, W]; t [B]; q, k [B, L, heads, head_dim], the image tokens first, frame slowest.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor, nn

from fastlightgen.models.base import Block, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import bar
from fastlightgen.rng import generator
from fastlightgen.stages.frame_heads import grid_of
from fastlightgen.stages.scores import Sample

QUERIES = 24  # the purpose of this file's random draws
Silent = dict[int, list[int]]  # block -> its silenced heads


class Keys(Protocol):
    """The keys of the measurement; the method documents them."""

    queries: int
    progress: bool
    seed: int


def between_frames(q: Tensor, k: Tensor, frame_q: Tensor, frame_k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The attention that each head pays to other frames than the query's own [B, heads]: the mean over queries of

        sum_{k: frame(k) != frame(q)} softmax_k(q k^T / sqrt(d))

    Keys behind the image tokens are text: they have a share of the softmax and count for no frame. `mask` [B, 1, 1, L]
    is true where a key may be read.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    paid = scores.softmax(-1)[..., : len(frame_k)]
    return (paid * (frame_q[:, None] != frame_k)).sum(-1).mean(-1)


@torch.no_grad()
def attention_mass(cfg: Keys, net: VideoDiT, samples: Sequence[Sample], key: str) -> Tensor:
    """The mean of `between_frames` over clips and times [blocks, heads], which the setting `key` asks for.

    The ranks divide clips and times. Clips are walked one at a time, because their attention takes memory, and every
    rank walks equally many, for the sake of sharded weights.
    """
    total = torch.zeros(net.num_blocks, net.config["num_attention_heads"], dtype=torch.float64)
    places = [(index, clip) for index, (x_t, *_) in enumerate(samples) for clip in range(len(x_t))]
    walks = bar(len(places), "attention between frames", cfg.progress)
    for (index, clip), reports in [(places[place], reports) for place, reports in ranks.turns(len(places), 1)]:
        x_t, t, _, cond = samples[index]
        frames, rows, columns = grid_of(net, x_t)
        if frames < 2:
            raise ValueError(f"{key}: the clips have 1 latent frame, and attention between frames needs 2 or more")
        frame = torch.arange(frames, device=x_t.device).repeat_interleave(rows * columns)
        picked = torch.randperm(len(frame), generator=generator(cfg.seed, QUERIES, index))[: cfg.queries].sort().values
        picked = picked.to(x_t.device)
        found: list[Tensor] = []  # the blocks run in order

        def look(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
            found.append(between_frames(q[:, picked], k, frame[picked], frame, mask)[0])  # noqa: B023

        own = itemgetter(slice(clip, clip + 1))
        net.watch = look
        net(own(x_t), own(t), cond.map(lambda x: own(x) if len(x) == len(x_t) else x))  # noqa: B023
        net.watch = None
        total += reports * torch.stack(found).cpu()
        walks.update(ranks.size())
    walks.close()
    return ranks.summed(total) / len(places)


def masks_of(net: VideoDiT, silent: Silent) -> dict[str, Tensor]:
    """0 at the weights that read silent heads, by parameter, over its last axis.

    A block whose heads are all silent has no self-attention: its output's bias goes too.
    """
    masks: dict[str, Tensor] = {}
    names, heads = {id(p): name for name, p in net.named_parameters()}, net.config["num_attention_heads"]
    width = net.cfg.dim // heads
    for block, quiet in silent.items():
        host = net.blocks[block]
        assert isinstance(host, Block)
        for layer, alone in host.attention_outputs():
            assert isinstance(layer, nn.Linear)
            masks[names[id(layer.weight)]] = mask = torch.ones(layer.in_features)
            for head in quiet:
                mask[head * width : (head + 1) * width] = 0
            if alone and len(quiet) == heads:
                masks[names[id(layer.bias)]] = torch.zeros(1)
    return masks


@torch.no_grad()
def silence(net: VideoDiT, masks: dict[str, Tensor]) -> None:
    """Zero the masked weights: the heads then add nothing to the hidden states."""
    for name, mask in masks.items():
        p = net.get_parameter(name)
        p.mul_(mask.to(p))


def keep_silent(net: VideoDiT, masks: dict[str, Tensor]) -> None:
    """Keep silenced weights at 0 in training: AdamW moves no weight without a gradient, and decays none that is 0."""
    for name, mask in masks.items():
        net.get_parameter(name).register_hook(lambda g, mask=mask: g * mask.to(g))
