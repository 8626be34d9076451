"""Block sets: checks, Stage II's random draw of blocks, and the ranking file of Stage I."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import IMPORTANCE


def check_keep(keep: Sequence[int] | None, num_blocks: int) -> frozenset[int]:
    """Return the set of blocks that run, checked; None means all blocks."""
    if keep is None:
        return frozenset(range(num_blocks))
    kept = frozenset(int(i) for i in keep)
    if not kept:
        raise ValueError("keep: names no block; at least one must run")
    unknown = sorted(i for i in kept if not 0 <= i < num_blocks)
    if unknown:
        raise ValueError(f"keep: blocks {unknown} are not in this model, which has blocks 0 to {num_blocks - 1}")
    return kept


def num_dropped(num_blocks: int, ratio: float) -> int:
    """The number of blocks to drop: round(ratio * N), but at least one is dropped and one kept."""
    # floor(x + 0.5) rounds ties up; round() would round them to even numbers.
    return min(max(math.floor(ratio * num_blocks + 0.5), 1), num_blocks - 1)


def draw_keep(pruned: Sequence[int], num_blocks: int, p: float, full_drop_prob: float, generator: torch.Generator):
    """Draw the blocks that run in a step of Stage II: drop all of `pruned` with full_drop_prob, else each with p.

    The generator must depend on (seed, step) alone, so that every rank draws the same set: with different sets the
    ranks of a sharded engine would wait for each other's collectives forever.
    """
    # One coin decides for all blocks together, the others for one block each.
    coins = torch.rand(len(pruned) + 1, generator=generator)
    dropped = [b for b, coin in zip(pruned, coins[1:], strict=True) if coins[0] < full_drop_prob or coin < p]
    return [i for i in range(num_blocks) if i not in dropped]


def read_importance(path: str | Path, num_blocks: int) -> dict:
    """Read Stage I's importance.json and check that it fits a model with `num_blocks` blocks."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: not found; run stage=1 with the same run= first")
    record = read_json(path, IMPORTANCE, "wanted a ranking: run stage=1 again with overwrite=true")
    kept, units, blocks = record["kept"], len(record["units"]), sorted([*record["kept"], *record["pruned"]])
    if units != num_blocks or blocks != list(range(num_blocks)) or not kept:
        raise ValueError(f"{path}: ranks {units} blocks, but the model has {num_blocks}; run stage=1 for this model")
    return record
