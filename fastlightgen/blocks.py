"""Which blocks run: block sets, the ranking file, and masks drawn alike on every rank."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch


def check_keep(keep: Sequence[int] | None, num_blocks: int) -> frozenset[int]:
    """The set of blocks that run; None keeps all of them."""
    if keep is None:
        return frozenset(range(num_blocks))
    kept = frozenset(int(i) for i in keep)
    if not kept:
        raise ValueError("keep: names no block; at least one must run")
    strangers = sorted(i for i in kept if not 0 <= i < num_blocks)
    if strangers:
        raise ValueError(f"keep: blocks {strangers} are not in this model, which has blocks 0 to {num_blocks - 1}")
    return kept


def num_dropped(num_blocks: int, ratio: float) -> int:
    """round(ratio * N), at least one block dropped and one kept."""
    return min(max(math.floor(ratio * num_blocks + 0.5), 1), num_blocks - 1)


def draw_keep(pruned: Sequence[int], num_blocks: int, p: float, full_drop_prob: float, generator: torch.Generator):
    """Stage II's independent reading: all of `pruned` dropped with full_drop_prob, else each one with probability p.

    The generator is made from (seed, step), so that every rank draws the same set: ranks that differ would wait
    for each other for ever in the collectives of a sharded engine.
    """
    coins = torch.rand(len(pruned) + 1, generator=generator)
    dropped = [b for b, coin in zip(pruned, coins[1:], strict=True) if coins[0] < full_drop_prob or coin < p]
    return [i for i in range(num_blocks) if i not in dropped]


def read_importance(path: str | Path, num_blocks: int) -> dict:
    """importance.json of Stage I, checked against the model it is to be used with."""
    path = Path(path)
    try:
        record = json.loads(path.read_text())
        kept, pruned = record["kept"], record["pruned"]
        units, blocks = len(record["units"]), sorted([*kept, *pruned])
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run stage=1 with the same run= first") from None
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{path}: not a ranking file ({err!r}); run stage=1 again with overwrite=true") from None
    if units != num_blocks or blocks != list(range(num_blocks)) or not kept:
        raise ValueError(f"{path}: ranks {units} blocks, but the model has {num_blocks}; run stage=1 for this model")
    return record
