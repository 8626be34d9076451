"""Searches for the set of blocks to drop (M of Eq. 3), given the errors of block sets.

n: number of blocks of the network; `free`: for each list of blocks, those that may be dropped; `counts`: how many
blocks of each list to drop; `mean`: the error of each single skip. Every search returns the dropped blocks, the least
harmful one first. `candidates` returns several such sets, for a choice after a short recovery of each.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen.blocks import num_dropped

Lists = Sequence[Sequence[int]]  # per list of blocks, their indices
MARGIN = 2  # blocks on each side of the limit between dropped and kept that `swaps` exchanges
Scores = Callable[[Sequence[Sequence[int] | None], str], Tensor]  # (block sets, title) -> errors [sets, samples]


class Ratio(Protocol):
    """The keys that say how much to drop."""

    @property
    def ratio(self) -> float: ...

    @property
    def ratio_unit(self) -> str: ...


def without(n: int, *blocks: int) -> list[int]:
    """Return the blocks of 0 .. n - 1 that remain when `blocks` are skipped."""
    return [i for i in range(n) if i not in blocks]


def drop_until(cost: Sequence[float], order: Sequence[int], ratio: float, total: float) -> int:
    """Return how many blocks of `order` (least important first) to drop, so that cost / total is closest to ratio."""
    dropped, best, count = 0.0, float("inf"), 1
    for n, block in enumerate(order[:-1], 1):
        dropped += cost[block]
        if abs(dropped / total - ratio) < best:
            best, count = abs(dropped / total - ratio), n
    return count


def lists_of(units: list[dict], choice: str) -> list[list[int]]:
    """Return the lists of blocks that `ratio` applies to: all blocks, those of one kind, or each kind separately."""
    kinds = list(dict.fromkeys(u["kind"] for u in units))
    if choice == "all":
        return [[u["index"] for u in units]]
    if len(kinds) < 2:
        raise ValueError(f"units={choice}: this model has one list of blocks ({units[0]['name']}, ...); use units=all")
    if choice not in (*kinds, "per_list"):
        names = ", ".join(kinds)
        raise ValueError(f"units={choice}: this model has the lists {names}; use one of them, per_list or all")
    return [[u["index"] for u in units if u["kind"] == k] for k in kinds if choice in (k, "per_list")]


def counts_of(cfg: Ratio, free: Lists, lists: Lists, costs: Sequence[float], mean: Sequence[float]) -> list[int]:
    """Return how many blocks of each list to drop."""
    if cfg.ratio_unit == "blocks":
        return [
            min(num_dropped(len(blocks), cfg.ratio), len(left) - 1) for left, blocks in zip(free, lists, strict=True)
        ]
    return [
        drop_until(costs, sorted(left, key=mean.__getitem__), cfg.ratio, sum(costs[i] for i in blocks))
        for left, blocks in zip(free, lists, strict=True)
    ]


def single_skip(n: int, free: Lists, counts: Sequence[int], mean: Sequence[float], scores: Scores) -> list[int]:
    """The paper's search: drop the blocks whose single skips have the smallest errors."""
    chosen = [sorted(left, key=mean.__getitem__)[:count] for left, count in zip(free, counts, strict=True)]
    return sorted((i for blocks in chosen for i in blocks), key=mean.__getitem__)


def iterative(n: int, free: Lists, counts: Sequence[int], mean: Sequence[float], scores: Scores) -> list[int]:
    """Drop the least harmful block, score the remaining ones without it, and repeat."""
    pruned: list[int] = []
    for number in range(sum(counts)):
        unfilled = [left for left, count in zip(free, counts, strict=True) if sum(i in left for i in pruned) < count]
        left = [i for blocks in unfilled for i in blocks if i not in pruned]
        title = f"stage 1: drop {number + 1} of {sum(counts)}"
        errors = scores([without(n, *pruned, i) for i in left], title).mean(1)
        pruned.append(left[int(errors.argmin())])
    return pruned


def exhaustive(n: int, free: Lists, counts: Sequence[int], mean: Sequence[float], scores: Scores) -> list[int]:
    """Return the best of all sets of the wanted size, as in Eq. 3."""
    choices = (combinations(left, count) for left, count in zip(free, counts, strict=True))
    sets = [sum(parts, ()) for parts in product(*choices)]
    groups = [[without(n, *s) for s in sets[i : i + 16]] for i in range(0, len(sets), 16)]
    titles = [f"stage 1: sets {16 * i} of {len(sets)}" for i in range(len(groups))]
    errors = torch.cat([scores(group, title).mean(1) for group, title in zip(groups, titles, strict=True)])
    return sorted(sets[int(errors.argmin())], key=mean.__getitem__)


SEARCHES = {"single_skip": single_skip, "iterative": iterative, "exhaustive": exhaustive}


def swaps(free: Lists, pruned: Sequence[int], mean: Sequence[float]) -> Iterator[list[int]]:
    """`pruned` with one block, of the last to drop, exchanged for a kept one of its list, of the first to keep."""
    for blocks in free:
        order = sorted(blocks, key=mean.__getitem__)
        back = [i for i in order if i in pruned][-MARGIN:]
        for out, kept in product([i for i in order if i not in pruned][:MARGIN], back):
            yield [*(i for i in pruned if i != kept), out]


def candidates(
    most: int, n: int, free: Lists, counts: Sequence[int], mean: Sequence[float], scores: Scores | None, greedy: bool
) -> list[dict[str, Any]]:
    """At most `most` sets with their error: the single skips' set, with `greedy` the iterative one, the best swaps.

    `scores` is None for scores of single blocks alone: their sum stands for the error of a set.
    """
    found = [single_skip(n, free, counts, mean, lambda keeps, title: torch.empty(0))]
    if greedy and scores:
        found.append(iterative(n, free, counts, mean, scores))
    found += [swapped for pruned in list(found) for swapped in swaps(free, pruned, mean)]
    sets = list(dict.fromkeys(tuple(sorted(pruned)) for pruned in found))
    first = len({tuple(sorted(pruned)) for pruned in found[: 1 + (greedy and scores is not None)]})
    if scores:
        errors = scores([without(n, *pruned) for pruned in sets], "stage 1: sets near the best").mean(1).tolist()
    else:
        errors = [sum(mean[i] for i in pruned) for pruned in sets]
    rest = sorted(range(first, len(sets)), key=errors.__getitem__)[: max(0, most - first)]
    return [{"pruned": list(sets[i]), "score": errors[i]} for i in [*range(first), *rest]]


def dropping(mean: Sequence[float], pruned: Sequence[int]) -> dict[str, Any]:
    """The part of importance.json that depends on the dropped blocks, `pruned`, the least harmful first."""
    keep = without(len(mean), *pruned)
    return {
        # most important block first; the block to drop first is last
        "ranking": sorted(keep, key=lambda i: -mean[i]) + list(pruned)[::-1],
        "kept": keep,
        "pruned": sorted(pruned),
        "pruning_ratio": len(pruned) / len(mean),
        "prefix": min(pruned),
    }
