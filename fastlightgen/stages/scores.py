"""Errors of networks that run some of their blocks, scores of single blocks, and the clips on which all are measured.

Magnitude and Taylor expansion (VDMini, Table 3) rank blocks one by one and say nothing of sets of blocks.
Shapes: x_t, x0, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.engine.guard import held_out_mean
from fastlightgen.engine.shards import gathered_weight
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator, normal_like

DRAWS, HELD_OUT = 1, 4  # the purposes of this file's random draws
Sample = tuple[Tensor, Tensor, Tensor, Cond]  # x_t, t, x0, cond


class ClipKeys(Protocol):
    """The keys that decide the clips."""

    clips: int
    batch: int


class EvaluationKeys(ClipKeys, Protocol):
    """The keys that decide the evaluation set."""

    timesteps: int
    t_range: list[float]
    shift: float
    seed: int

    @property
    def bounds(self) -> tuple[float, float]: ...


def evaluation_clips(cfg: ClipKeys, batches: Callable[[int], Batch]) -> Iterator[tuple[int, Batch]]:
    """Yield (number of the first clip, clips), `clips` in all."""
    for start in range(0, cfg.clips, cfg.batch):
        size = min(cfg.batch, cfg.clips - start)
        yield start, batches(start // cfg.batch).map(itemgetter(slice(size)))


def evaluation_set(cfg: EvaluationKeys, batches: Callable[[int], Batch]) -> Iterator[Sample]:
    """Yield `clips` clips at `timesteps` stratified times each; all candidates see the same x0, noise and t."""
    low, high = flow.unshifted(cfg.shift, cfg.bounds, *cfg.t_range)
    for start, batch in evaluation_clips(cfg, batches):
        x0, cond = batch.x0, batch.cond
        for k in range(cfg.timesteps):
            gen = generator(cfg.seed, DRAWS, start, k)
            u = (k + torch.rand(len(x0), generator=gen)) / cfg.timesteps  # stratum k of U(0, 1)
            t = flow.shift_time(low + (high - low) * u, cfg.shift).to(x0.device)
            yield flow.add_noise(x0, normal_like(x0, gen), t), t, x0, cond


def x0_error(v: Tensor, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Eq. 4 per sample: mean over elements of |x_t - t v - x0|^2, reduced in float32; large: the block mattered."""
    return (flow.x0_from_velocity(x_t.float(), v.float(), t) - x0.float()).square().flatten(1).mean(1)


def output_mse(v: Tensor, v_full: Tensor) -> Tensor:
    """Eq. 3 per sample: mean over elements of |y_pruned - y_original|^2 (y: the output of Eq. 2)."""
    return (v.float() - v_full.float()).square().flatten(1).mean(1)


def denoising_error(
    net: VideoDiT, keep: Sequence[int] | None, x0: Tensor, t: Tensor, noise: Tensor, cond: Cond
) -> Tensor:
    """Eq. 4 per sample, for a network that runs the blocks `keep`."""
    x_t = flow.add_noise(x0, noise, t)
    return x0_error(net(x_t, t, cond, keep), x_t, t, x0)


def held_out_error(net: VideoDiT, batch: Batch, cfg: Any, keep: Sequence[int] | None = None) -> float:
    """The mean of Eq. 4 over held-out clips, as many at a time as in training, for memory."""
    low, high = flow.unshifted(cfg.shift, cfg.bounds, 0.02, 0.98)
    times = flow.shift_time(torch.linspace(low, high, len(batch.x0)), cfg.shift)
    noise = normal_like(batch.x0, generator(cfg.seed, HELD_OUT))
    measure = partial(denoising_error, net, keep)
    at_once = cfg.micro_batch or max(1, cfg.batch // ranks.shares(cfg.sequence_parallel)[1])
    clips = batch.x0, times, noise
    return held_out_mean(measure, clips, batch.cond, net.device, at_once, cfg.sequence_parallel)


@torch.no_grad()
def l2(net: VideoDiT) -> Tensor:
    """The sum of squares of a block's parameters."""
    out = torch.zeros(net.num_blocks, dtype=torch.float64)
    for i, block in enumerate(net.blocks):
        for p in block.parameters():
            with gathered_weight(p) as value:
                out[i] += value.double().square().sum().cpu()
    return out


def taylor(net: VideoDiT, samples: Sequence[Sample]) -> Tensor:
    """|sum_w w dL/dw| over a block's parameters: the first-order change of L if they all become 0.

    L is the mean of Eq. 4 over the samples, from one backward pass of each. A gradient is freed as soon as it is used.
    """
    out = torch.zeros(net.num_blocks, dtype=torch.float64)
    total = sum(len(t) for _, t, _, _ in samples)

    def add(i: int, p: Tensor) -> None:
        assert p.grad is not None
        out[i] += (p.detach().double() * p.grad.double()).sum().cpu()
        p.grad = None

    trained = [p for p in net.parameters() if p.requires_grad]
    net.requires_grad_(False)
    hooks = []
    for i, block in enumerate(net.blocks):
        for p in block.requires_grad_(True).parameters():
            hooks.append(p.register_post_accumulate_grad_hook(partial(add, i)))
    for index, reports in ranks.turns(len(samples), 1):
        if reports:
            x_t, t, x0, cond = samples[index]
            with torch.enable_grad():
                (x0_error(net(x_t, t, cond), x_t, t, x0).sum() / total).backward()
    for hook in hooks:
        hook.remove()
    net.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    return ranks.summed(out).abs()
