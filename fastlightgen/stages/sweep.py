"""A sweep of Stage I: the scores of sets of blocks, one after the other, into a table that an interruption keeps.

Shapes: x_t, t, x0, v as in rank.py; errors [block sets, samples]; features of clips [block sets, clips, D].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen.models.base import Stream, VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.stages.scores import Sample, output_mse, x0_error

Keeps = Sequence[Sequence[int] | None]  # sets of blocks that run; None: all


class Sweep(Protocol):
    """The scores of one sweep [block sets, samples] or [block sets, samples, D]: NaN where they are not known yet.

    They are float32, on the CPU.
    """

    table: Tensor

    def tick(self, scores: int) -> object:
        """Called during a walk: so many more scores are nearly known."""

    def note(self) -> None:
        """Called on all ranks after every walk: `table` holds its scores now. May end the run after a signal."""


class Sweeps(Protocol):
    """Opens the next sweep."""

    def __call__(self, sets: int, samples: int, title: str, width: int = 0) -> AbstractContextManager[Sweep]:
        """`width`: numbers of one score, D above; 0: a score is a single number."""


def fill(
    model: VideoDiT,
    sizes: Sequence[int],
    sweep: Sweep,
    together: Callable[[int], int],
    measure: Callable[[int, list[int], int], Tensor],
) -> Tensor:
    """Fill the table of a sweep, and return it. The ranks divide the batches of samples, whose `sizes` are given.

    `measure(batch, sets, scores)` returns the scores of this rank's batch for some sets, and ticks `scores` meanwhile;
    `together(batch)`: how many sets it takes at a time. What the sweep knows already is not measured again; it learns
    the new scores after every call.
    """
    sequence = model.sequence.size if model.sequence else 1  # ranks that share a clip's tokens
    _, groups = ranks.shares(sequence)
    offsets = [0, *accumulate(sizes)]
    table = sweep.table
    for turn, (index, reports) in enumerate(ranks.turns(len(sizes), sequence)):
        own = slice(offsets[index], offsets[index + 1])
        # The samples of this turn, of all ranks: every rank walks the same block sets, for the sake of sharded weights.
        first, last = turn * groups, min((turn + 1) * groups, len(sizes))
        columns = slice(offsets[first], offsets[last])
        left = table[:, columns].isnan().flatten(1).any(1).nonzero().flatten().tolist()
        at_once = together(index)
        for start in range(0, len(left), at_once):
            group = left[start : start + at_once]
            found = table.new_zeros(len(group), *table.shape[1:])
            scores = measure(index, group, len(group) * (offsets[last] - offsets[first]))
            if reports:
                found[:, own] = scores.to(found)
            table[group, columns] = ranks.summed(found)[:, columns]
            sweep.note()
    return table


@torch.no_grad()
def score_sets(
    model: VideoDiT, samples: Sequence[Sample], keeps: Keeps, kind: str, memory: float, sweep: Sweep
) -> Tensor:
    """Return the errors [block sets, samples] of the block sets `keeps`, from walks that share prefixes.

    All single skips and the full pass take N (N + 1) / 2 block evaluations instead of N^2. A walk holds two hidden
    tensors per block set, so they are walked in groups of at most `memory` GB.
    """
    whole: dict[int, Tensor] = {}  # batch -> v of the full pass

    def together(index: int) -> int:
        parts = model.sequence.size if model.sequence else 1
        return max(1, int(memory * 1e9 * parts / (2 * model.hidden_bytes(samples[index][0]))))

    def measure(index: int, group: list[int], scores: int) -> Tensor:
        x_t, t, x0, cond = samples[index]
        joins = kind == "output_mse" and index not in whole  # the full pass joins the first group
        streams = [Stream(cond)] * joins + [Stream(cond, keeps[row]) for row in group]
        with ticking(model, scores, sweep.tick):
            out = model.walk(x_t, t, streams)
        if joins:
            whole.clear()
            whole[index] = out.pop(0)
        return torch.stack([x0_error(v, x_t, t, x0) if not whole else output_mse(v, whole[index]) for v in out])

    return fill(model, [len(t) for _, t, _, _ in samples], sweep, together, measure)


def parts(total: int, count: int) -> Iterator[int]:
    """`total` as a sum of `count` nearly equal numbers, and zeros after them."""
    yield from (end - start for start, end in pairwise(total * i // count for i in range(count + 1)))
    while True:
        yield 0


@contextmanager
def ticking(model: VideoDiT, scores: int, tick: Callable[[int], object]) -> Iterator[None]:
    """During one walk, tick `scores` in all, a part after each block: a walk of a large model takes minutes."""
    left = parts(scores, model.num_blocks)
    said = 0

    def after(*_: Any) -> None:
        nonlocal said
        said += (part := next(left))
        tick(part)

    hooks = [block.register_forward_hook(after) for block in model.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    tick(scores - said)  # blocks that no stream ran
