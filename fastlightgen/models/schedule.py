"""The schedule of a walk: which streams share a hidden state, block by block. Plain Python, no tensors.

Streams with equal start states begin as one group. A group splits in two places: before the first block that only some
of its streams run (a fork), and inside the first block that it runs, if its prompts differ, because the block reads the
text. `VideoDiT` executes a schedule with tensors, and the planner sums the costs of the same schedule.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Group(NamedTuple):
    """Streams that share one hidden state."""

    members: tuple[int, ...]  # indices of the streams
    grad: bool  # True if one of them carries gradient


class Fork(NamedTuple):
    """A group splits before a block."""

    group: Group
    inside: Group  # the streams that run the block
    outside: Group  # the streams that skip it


class Run(NamedTuple):
    """A group runs a block and leaves it as one group per prompt."""

    group: Group
    parts: list[Group]


class Step(NamedTuple):
    """One block that at least one stream runs. Groups that the step does not name keep their state."""

    block: int  # index of the block
    forks: list[Fork]  # executed before the runs
    runs: list[Run]  # executed in one call of the block


class Schedule(NamedTuple):
    """A walk of several streams, step by step."""

    everyone: Group  # all streams
    prompts: list[Group]  # the streams of each prompt
    starts: list[Group]  # the streams of each start state: the groups before the first block
    steps: list[Step]
    ends: list[Run]  # the groups after the last block; each part gets one prediction


def schedule(
    keeps: Sequence[Collection[int]],
    prompts: Sequence[Hashable],
    starts: Sequence[Hashable],
    grads: Sequence[bool],
    num_blocks: int,
) -> Schedule:
    """Compute the schedule of some streams. `keeps`, `prompts`, `starts` and `grads` have one entry per stream.

    `keeps`: indices of the blocks that run; `prompts`, `starts`: equal keys mean equal prompts and equal start states;
    `grads`: True if the stream carries gradient.
    """

    def group(members: Sequence[int]) -> Group:
        return Group(tuple(members), any([grads[i] for i in members]))

    def split(parent: Group, keys: Sequence[Hashable]) -> list[Group]:
        """Split a group into one group per key, in the order in which the keys appear."""
        found = dict.fromkeys([keys[i] for i in parent.members])
        if len(found) == 1:
            return [parent]
        return [group([i for i in parent.members if keys[i] == key]) for key in found]

    everyone = group(range(len(keeps)))
    groups = start_groups = split(everyone, starts)
    steps = []
    for block in range(num_blocks):
        forks, running, waiting = [], [], []
        for g in groups:
            inside = [i for i in g.members if block in keeps[i]]
            if len(inside) == len(g.members):
                running.append(g)
            elif not inside:
                waiting.append(g)
            else:
                fork = Fork(g, group(inside), group([i for i in g.members if block not in keeps[i]]))
                forks.append(fork)
                running.append(fork.inside)
                waiting.append(fork.outside)
        if running:
            runs = [Run(g, split(g, prompts)) for g in running]
            groups = [part for run in runs for part in run.parts] + waiting
            steps.append(Step(block, forks, runs))
    ends = [Run(g, split(g, prompts)) for g in groups]
    return Schedule(everyone, split(everyone, prompts), start_groups, steps, ends)


def read_once(prompts: Iterable[tuple[Key, bool]]) -> dict[Key, bool]:
    """The distinct prompts that a block has to read, in order -> True if the reading carries gradient.

    `prompts`: (prompt, gradient or not) of every part of every run. Reading carries gradient if one of the parts does.
    """
    out: dict[Key, bool] = {}
    for prompt, grad in prompts:
        out[prompt] = out.get(prompt, False) or grad
    return out
