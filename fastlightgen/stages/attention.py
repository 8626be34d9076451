"""The attention between frames of every head, and heads that are silenced by zeroed output weights.

Shapes: x_t [B, C, F, H, W]; t [B]; q, k [B, L, heads, head_dim], the image tokens first, frame slowest.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor, nn

from fastlightgen.data.source import Batch
from fastlightgen.models.base import Block, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import bar
from fastlightgen.rng import generator
from fastlightgen.stages.frame_heads import grid_of
from fastlightgen.stages.scores import EvaluationKeys, evaluation_set

QUERIES = 24  # the purpose of this file's random draws
Silent = dict[int, list[int]]  # block -> its silenced heads


class Keys(EvaluationKeys, Protocol):
    """The keys of the measurement; the method documents them."""

    queries: int
    progress: bool


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
def attention_mass(cfg: Keys, net: VideoDiT, batches: Callable[[int], Batch]) -> Tensor:
    """The mean of `between_frames` over clips and times [blocks, heads]. The ranks divide the samples."""
    total = torch.zeros(net.num_blocks, net.config["num_attention_heads"], dtype=torch.float64)
    walks = bar(cfg.clips * cfg.timesteps, "attention between frames", cfg.progress)
    for index, (x_t, t, _, cond) in enumerate(evaluation_set(cfg, batches)):
        walks.update(len(x_t))
        if index % ranks.size() != ranks.rank():
            continue
        frames, rows, columns = grid_of(net, x_t)
        if frames < 2:
            raise ValueError("method=f3: the clips have 1 latent frame, and attention between frames needs 2 or more")
        frame = torch.arange(frames, device=x_t.device).repeat_interleave(rows * columns)
        picked = torch.randperm(len(frame), generator=generator(cfg.seed, QUERIES, index))[: cfg.queries].sort().values
        picked = picked.to(x_t.device)
        for clip in range(len(x_t)):  # one at a time: the scores take memory
            found: list[Tensor] = []  # the blocks run in order

            def look(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
                found.append(between_frames(q[:, picked], k, frame[picked], frame, mask)[0])  # noqa: B023

            own = itemgetter(slice(clip, clip + 1))
            net.watch = look
            net(own(x_t), own(t), cond.map(lambda x: own(x) if len(x) == len(x_t) else x))  # noqa: B023
            total += torch.stack(found).cpu()
    net.watch = None
    walks.close()
    return ranks.summed(total) / (cfg.clips * cfg.timesteps)


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
