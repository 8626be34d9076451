"""Stage I: rank the blocks by the x0 error that skipping each one causes (Tweedie, Eq. 3 and 4).

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B]; errors [clips x timesteps].
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, combinations, product

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.blocks import num_dropped
from fastlightgen.data.source import Batch
from fastlightgen.models.base import Cond, Stream, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator, normal_like

Sample = tuple[Tensor, Tensor, Tensor, Cond]  # x_t, t, x0, cond


def x0_error(v: Tensor, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Eq. 4 per sample: mean over elements of |x_t - t v - x0|^2, reduced in float32; large: the block mattered."""
    return (flow.x0_from_velocity(x_t.float(), v.float(), t) - x0.float()).square().flatten(1).mean(1)


def output_mse(v: Tensor, v_full: Tensor) -> Tensor:
    """Eq. 3 per sample: mean over elements of |y_skip - y|^2."""
    return (v.float() - v_full.float()).square().flatten(1).mean(1)


def evaluation_set(cfg, batches: Callable[[int], Batch]) -> Iterator[Sample]:
    """`clips` clips at `timesteps` stratified times each; the same x0, noise and t for every candidate."""
    low, high = cfg.t_range
    for start in range(0, cfg.clips, cfg.batch):
        batch = batches(start // cfg.batch)
        size = min(cfg.batch, cfg.clips - start)
        x0, cond = batch.x0[:size], batch.cond.map(lambda v, n=size: v[:n])
        for k in range(cfg.timesteps):
            gen = generator(cfg.seed, 1, start, k)
            u = (k + torch.rand(size, generator=gen)) / cfg.timesteps  # stratum k of U(0, 1)
            t = flow.shift_time(low + (high - low) * u, cfg.shift).to(x0.device)
            yield flow.add_noise(x0, normal_like(x0, gen), t), t, x0, cond


@torch.no_grad()
def score_sets(
    model: VideoDiT, samples: Sequence[Sample], keeps: list, kind: str, memory: float, tick: Callable[[int], None]
) -> Tensor:
    """The error of every candidate block set, [candidates, samples], from lock-step walks that share prefixes.

    All single skips and the full pass take N (N + 1) / 2 block evaluations instead of N N. A walk holds two hidden
    tensors per candidate, so candidates go in groups of at most `memory` GiB. Several processes share the samples.
    """
    together = model.sequence.size if model.sequence else 1  # ranks that share a clip's tokens
    _, groups = ranks.shares(together)
    offsets = [0, *accumulate(len(t) for _, t, _, _ in samples)]
    table = samples[0][0].new_zeros(len(keeps), offsets[-1], dtype=torch.float32)
    for index, reports in ranks.turns(len(samples), together):
        x_t, t, x0, cond = samples[index]
        size = max(1, int(memory * 2**30 * together / (2 * model.hidden_bytes(x_t))))
        column, v_full = [], None
        for start in range(0, len(keeps), size):
            first = kind == "output_mse" and v_full is None  # the full pass joins the first group
            streams = [Stream(cond)] * first + [Stream(cond, keep) for keep in keeps[start : start + size]]
            out = model.walk(x_t, t, streams)
            if first:
                v_full = out.pop(0)
            column += [x0_error(v, x_t, t, x0) if v_full is None else output_mse(v, v_full) for v in out]
        if reports:
            table[:, offsets[index] : offsets[index + 1]] = torch.stack(column)
        tick(len(t) * groups)
    return ranks.summed(table)


def drop_until(cost: Sequence[float], order: Sequence[int], ratio: float, total: float) -> int:
    """How many blocks of `order` (least important first) to drop: their share of `total` comes closest to ratio."""
    dropped, best, count = 0.0, float("inf"), 1
    for n, block in enumerate(order[:-1], 1):
        dropped += cost[block]
        if abs(dropped / total - ratio) < best:
            best, count = abs(dropped / total - ratio), n
    return count


def lists_of(units: list[dict], choice: str) -> list[list[int]]:
    """The block lists that `ratio` counts: all blocks, those of one kind, or each kind for itself."""
    kinds = list(dict.fromkeys(u["kind"] for u in units))
    if choice == "all":
        return [[u["index"] for u in units]]
    if len(kinds) < 2:
        raise ValueError(f"units={choice}: this model has one list of blocks ({units[0]['name']}, ...); use units=all")
    return [[u["index"] for u in units if u["kind"] == k] for k in kinds if choice in (k, "per_list")]


def rank(cfg, model: VideoDiT, batches: Callable[[int], Batch], costs: list[float], bar) -> dict:
    """importance.json: scores, the set that is kept, and what was measured on. `bar(total)` makes a progress bar."""
    n, units = model.num_blocks, model.units()
    lists = lists_of(units, cfg.units)
    free = [[i for i in blocks if cfg.protect_first <= i < n - cfg.protect_last] for blocks in lists]
    for left, blocks in zip(free, lists, strict=True):
        if len(left) < 2:
            raise ValueError(
                f"protect_first, protect_last: leave {len(left)} of {len(blocks)} blocks to choose from; "
                "at least 2 are needed"
            )
    samples = list(evaluation_set(cfg, batches))

    def without(*blocks: int) -> list[int]:
        return [i for i in range(n) if i not in blocks]

    def scores(keeps: list, title: str) -> Tensor:
        with bar(sum(len(s[1]) for s in samples), title) as progress:
            return score_sets(model, samples, keeps, cfg.score, cfg.memory, progress.update)

    # Single skips: the paper's ranking, and the start of the other searches.
    table = scores([without(i) for i in range(n)] + [None], "stage 1: skip each block")
    single, base = table[:-1], table[-1]
    mean = single.mean(1)

    def least_first(blocks) -> list[int]:
        return sorted(blocks, key=lambda i: mean[i].item())

    counts = []
    for left, blocks in zip(free, lists, strict=True):
        if cfg.ratio_unit == "blocks":
            counts.append(min(num_dropped(len(blocks), cfg.ratio), len(left) - 1))
        else:
            counts.append(drop_until(costs, least_first(left), cfg.ratio, sum(costs[i] for i in blocks)))

    if cfg.search == "single_skip":
        pruned = least_first([i for left, count in zip(free, counts) for i in least_first(left)[:count]])
    elif cfg.search == "iterative":  # drop the least harmful, score again with it gone
        pruned: list[int] = []
        for number in range(sum(counts)):
            open_ = [left for left, count in zip(free, counts) if sum(i in left for i in pruned) < count]
            left = [i for some in open_ for i in some if i not in pruned]
            errors = scores([without(*pruned, i) for i in left], f"stage 1: drop {number + 1} of {sum(counts)}").mean(1)
            pruned.append(left[int(errors.argmin())])
    else:  # exhaustive: every set of that size
        choices = (combinations(left, count) for left, count in zip(free, counts))
        sets = [sum(parts, ()) for parts in product(*choices)]
        groups = [[without(*s) for s in sets[i : i + 16]] for i in range(0, len(sets), 16)]
        errors = torch.cat([scores(g, f"stage 1: sets {16 * i} of {len(sets)}").mean(1) for i, g in enumerate(groups)])
        pruned = least_first(sets[int(errors.argmin())])
    kept = without(*pruned)
    by_score = sorted(kept, key=lambda i: -mean[i].item())
    together = scores([kept], "stage 1: all of them dropped")[0]
    return {
        "units": [u | {"score": single[i].mean().item(), "stderr": stderr(single[i])} for i, u in enumerate(units)],
        "baseline_score": base.mean().item(),
        "baseline_stderr": stderr(base),
        "pruned_score": together.mean().item(),
        "ranking": by_score + pruned[::-1],  # most important first; the first to be dropped stands last
        "kept": kept,
        "pruned": sorted(pruned),
        "pruning_ratio": len(pruned) / n,
        "prefix": min(pruned),
        "search": cfg.search,
        "score_kind": cfg.score,
        "num_samples": table.shape[1],
        "seed": cfg.seed,
    }


def stderr(x: Tensor) -> float:
    return (x.std() / x.numel() ** 0.5).item() if x.numel() > 1 else 0.0
