"""Scores of blocks, and the clips on which they are measured.

Scores are the errors of walks that skip blocks, or magnitude and Taylor expansion (VDMini, Table 3). The latter two
rank blocks one by one and say nothing of sets of blocks. Shapes: x_t, x0, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Protocol

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.engine.shards import gathered_weight
from fastlightgen.models.base import Cond, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator, normal_like

DRAWS = 1  # the purpose of this file's random draws
Sample = tuple[Tensor, Tensor, Tensor, Cond]  # x_t, t, x0, cond


class EvaluationKeys(Protocol):
    """The keys that decide the evaluation set."""

    clips: int
    timesteps: int
    t_range: list[float]
    batch: int
    shift: float
    seed: int


def evaluation_set(cfg: EvaluationKeys, batches: Callable[[int], Batch]) -> Iterator[Sample]:
    """Yield `clips` clips at `timesteps` stratified times each; all candidates see the same x0, noise and t."""
    low, high = cfg.t_range
    for start in range(0, cfg.clips, cfg.batch):
        batch = batches(start // cfg.batch)
        size = min(cfg.batch, cfg.clips - start)
        x0, cond = batch.x0[:size], batch.cond.map(itemgetter(slice(size)))
        for k in range(cfg.timesteps):
            gen = generator(cfg.seed, DRAWS, start, k)
            u = (k + torch.rand(size, generator=gen)) / cfg.timesteps  # stratum k of U(0, 1)
            t = flow.shift_time(low + (high - low) * u, cfg.shift).to(x0.device)
            yield flow.add_noise(x0, normal_like(x0, gen), t), t, x0, cond


def x0_error(v: Tensor, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Eq. 4 per sample: mean over elements of |x_t - t v - x0|^2, reduced in float32; large: the block mattered."""
    return (flow.x0_from_velocity(x_t.float(), v.float(), t) - x0.float()).square().flatten(1).mean(1)


def output_mse(v: Tensor, v_full: Tensor) -> Tensor:
    """Eq. 3 per sample: mean over elements of |y_pruned - y_original|^2 (y: the output of Eq. 2)."""
    return (v.float() - v_full.float()).square().flatten(1).mean(1)


@torch.no_grad()
def l2(net: VideoDiT, samples: Sequence[Sample]) -> Tensor:
    """The sum of squares of a block's parameters. It needs no clips."""
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


BLOCK_SCORES: dict[str, Callable[[VideoDiT, Sequence[Sample]], Tensor]] = {"l2": l2, "taylor": taylor}
