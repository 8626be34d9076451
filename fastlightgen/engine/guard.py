"""A number of every held-out clip, averaged: the ranks share the clips, and all of them get the mean."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlightgen.models.base import Cond
from fastlightgen.parallel import ranks


@torch.no_grad()
def held_out_mean(
    measure: Callable[..., Tensor],
    fields: Sequence[Tensor],
    cond: Cond,
    device: torch.device,
    at_once: int,
    sequence_parallel: int,
) -> float:
    """The mean of measure(*fields, cond) [n] over all clips, `at_once` of them in one call.

    All ranks call the network equally often, because its weights may be sharded: `ranks.turns` repeats a clip where the
    numbers do not come out even, and nobody reports the repetition.
    """
    count = len(fields[0])
    table = torch.zeros(count)
    turns = ranks.turns(count, sequence_parallel)
    for start in range(0, len(turns), at_once):
        now = turns[start : start + at_once]
        rows = torch.tensor([index for index, _ in now])

        def pick(x: Tensor, rows: Tensor = rows) -> Tensor:
            return x[rows.to(x.device)].to(device)

        values = measure(*map(pick, fields), cond.map(pick))
        for (index, reports), value in zip(now, values.tolist(), strict=True):
            if reports:
                table[index] = value
    return ranks.summed(table).mean().item()
