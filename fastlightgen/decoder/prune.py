"""Prune the decoder of a VAE: residual blocks first, then channels, so that diffusers' own class holds the rest.

Its configuration has one number of residual blocks for all levels and one width that scales all levels, so every level
loses equally many blocks and the same share of its channels (VDMini, appendix A, prunes levels unequally).
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.decoder.layout import KINDS, Layout, has_shortcut

Kept = Mapping[str, Tensor]  # axis -> indices of the channels that stay, ascending
Pairs = Sequence[tuple[Tensor, Tensor]]  # latents [B, C, f, h, w], and the frames [B, 3, F, H, W] that they encode


def error(vae: Any, z: Tensor, x: Tensor) -> Tensor:
    """The mean squared error of the frames that the VAE decodes."""
    return (vae.decode(z).sample - x).square().mean()


def allowed_parts(layout: Layout, parts: int) -> list[int]:
    """How many of `parts` equal parts of the channels can stay: the numbers that leave whole channels everywhere."""
    return [left for left in range(1, parts + 1) if all(size * left % parts == 0 for size in layout.sizes.values())]


def channel_scores(vae: Any, layout: Layout, pairs: Pairs, kind: str) -> dict[str, Tensor]:
    """A score per channel of every axis; the channels with the lowest go.

    norm: the sum of the squares of the weights that make the channel. taylor: the squared first-order change of the
    error if the channel vanishes, d error / d m at m = 1 for a factor m on those weights, summed over the pairs.
    """
    decoder = vae.decoder
    names = list(layout.sides)
    weights = [decoder.get_parameter(name) for name in names]
    scores = {axis: torch.zeros(size) for axis, size in layout.sizes.items()}
    if kind == "norm":
        add_rows(scores, layout, names, [w.detach().square() for w in weights])
        return scores
    for z, x in pairs:
        gradients = torch.autograd.grad(error(vae, z, x), weights)
        change = {axis: torch.zeros(size) for axis, size in layout.sizes.items()}
        add_rows(change, layout, names, [(w * g).detach() for w, g in zip(weights, gradients, strict=True)])
        for axis in scores:
            scores[axis] += change[axis].square()
    return scores


def add_rows(scores: dict[str, Tensor], layout: Layout, names: Sequence[str], values: Iterable[Tensor]) -> None:
    """Add to every axis the sums over the rows (dimension 0) of the tensors that write it."""
    for name, value in zip(names, values, strict=True):
        rows = value.reshape(len(value), -1).sum(1).cpu()
        axes = layout.sides[name][0]
        for axis, part in zip(axes, rows.chunk(len(axes)) if axes else (), strict=True):
            scores[axis] += part


def choose(scores: Mapping[str, Tensor], layout: Layout, left: int, parts: int) -> dict[str, Tensor]:
    """Of every axis the `left` of `parts` parts with the highest scores, in whole units."""
    kept = {}
    for axis, score in scores.items():
        unit = layout.units.get(axis, 1)
        units = score.reshape(-1, unit).sum(1)
        best = units.topk(len(units) * left // parts).indices.sort().values
        kept[axis] = (best[:, None] * unit + torch.arange(unit)).flatten()
    return kept


def pruned(state: Mapping[str, Tensor], layout: Layout, kept: Kept) -> dict[str, Tensor]:
    """The decoder's tensors without the channels that go.

    Where a layer divides by a number of channels, its weights make up for the smaller number: the result equals the
    full decoder with those channels set to zero.
    """
    out = dict(state)
    for name, sides in layout.sides.items():
        for dim, axes in enumerate(sides):
            if axes:
                index = torch.cat([kept[axis] + k * layout.sizes[axis] for k, axis in enumerate(axes)])
                out[name] = out[name].index_select(dim, index.to(out[name].device))
    for name, segment, axis, power in layout.scaled:
        size = len(kept[axis])
        out[name] = out[name].clone()
        out[name][segment * size : (segment + 1) * size] *= (size / layout.sizes[axis]) ** power
    return out


def removable(decoder: Any) -> list[list[int]]:
    """Of every level the residual blocks that keep the number of channels, so that their stream can pass them by."""
    return [[j for j, resnet in enumerate(block.resnets) if not has_shortcut(resnet)] for block in decoder.up_blocks]


@torch.no_grad()
def choose_blocks(vae: Any, pairs: Pairs, count: int) -> dict[int, list[int]]:
    """Level -> the `count` residual blocks without which the error grows least, each left out alone."""
    out: dict[int, list[int]] = {}
    for level, candidates in enumerate(removable(vae.decoder)):
        costs = {}
        for j in candidates:
            resnet = vae.decoder.up_blocks[level].resnets[j]
            resnet.forward = lambda x, *_, **__: x
            costs[j] = sum(error(vae, z, x).item() for z, x in pairs)
            del resnet.forward
        out[level] = sorted(sorted(candidates, key=costs.__getitem__)[:count])
    return out


def without_blocks(decoder: Any, dropped: Mapping[int, Sequence[int]]) -> Any:
    """A copy of the decoder without some residual blocks of its levels."""
    out = copy.deepcopy(decoder)
    for level, gone in dropped.items():
        block = out.up_blocks[level]
        block.resnets = nn.ModuleList([resnet for j, resnet in enumerate(block.resnets) if j not in gone])
    return out


def small_vae(vae: Any, decoder: Any, kept: Kept, left: int, parts: int, dropped: int) -> tuple[Any, bool]:
    """A VAE of the same class with the pruned decoder, and whether it has the encoder of `vae`.

    Where one key of the class counts for both halves, the encoder does not fit any more. Its weights are NaN then:
    nobody takes what it encodes for latents.
    """
    kind = KINDS[type(vae).__name__]
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    if left < parts:
        config |= kind.narrowed(config, left, parts)
    config[kind.blocks] -= dropped
    small = type(vae).from_config(config)
    small.decoder.load_state_dict(pruned(decoder.state_dict(), kind.layout(decoder), kept))
    for part in ("quant_conv", "post_quant_conv"):
        getattr(small, part).load_state_dict(getattr(vae, part).state_dict())
    mine, its = small.encoder.state_dict(), vae.encoder.state_dict()
    whole = {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in its.items()}
    small.encoder.load_state_dict(its if whole else {k: torch.full_like(v, torch.nan) for k, v in mine.items()})
    return small.to(next(vae.parameters()).device), whole


def compress(vae: Any, pairs: Pairs, share: float, dropped: int, score: str) -> tuple[Any, dict[str, Any]]:
    """Drop `dropped` residual blocks per level, then keep about `share` of the channels: (VAE, what was done)."""
    kind = KINDS[type(vae).__name__]
    vae.requires_grad_(False)
    most = vae.config[kind.blocks]
    if dropped > most:
        raise ValueError(
            f"drop_layers={dropped}: a level of this decoder has {most + 1} residual blocks; give 0 to {most}"
        )
    gone = choose_blocks(vae, pairs, dropped) if dropped else {}
    full, vae.decoder = vae.decoder, without_blocks(vae.decoder, gone)
    layout, parts = kind.layout(vae.decoder), kind.parts(vae.decoder)
    left = min(allowed_parts(layout, parts), key=lambda n: (abs(n / parts - share), n))
    if left == parts and not dropped:
        raise ValueError(
            f"keep_channels={share:g}: this decoder's channels can be cut into {parts} parts, of which all would stay; "
            f"give a smaller share, or drop_layers=1"
        )
    vae.decoder.requires_grad_(True)
    scores = channel_scores(vae, layout, pairs, score)
    vae.decoder.requires_grad_(False)
    small, whole = small_vae(vae, vae.decoder, choose(scores, layout, left, parts), left, parts, dropped)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (full, small.decoder))
    vae.decoder = full
    record = {"channels": [left, parts], "dropped": gone, "parameters": [before, after], "encoder": whole}
    return small, record
