"""The mean of a measure over the held-out clips; the ranks divide the clips among them."""

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
    """Return the mean of measure(*fields, cond) [n] over all clips, on every rank; `at_once` clips per call.

    All ranks must call the network equally often, because its weights may be sharded. If the clips do not divide
    evenly, `ranks.turns` repeats a clip on some ranks, and its repeated value is not counted.
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
