"""The schedule of a walk: which streams share a hidden state, block by block. Plain Python, no tensors.

Streams with equal start states begin as one group. A group parts in two places: before the first block that only some
of its streams run (a fork), and inside the first block that it runs, if its prompts differ, because the block reads the
text. `VideoDiT` executes a schedule with tensors, and the planner sums the costs of the same schedule.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Group(NamedTuple):
    """Streams that share one hidden state."""

    members: tuple[int, ...]  # indices of the streams
    grad: bool  # does one of them carry gradient?


class Fork(NamedTuple):
    """A group parts before a block."""

    group: Group
    inside: Group  # those that run the block
    outside: Group  # those that skip it


class Run(NamedTuple):
    """A group goes through a block, and leaves it as one part per prompt."""

    group: Group
    parts: list[Group]


class Step(NamedTuple):
    """One block that at least one stream runs. Groups that the step does not name wait."""

    block: int
    forks: list[Fork]  # these come first
    runs: list[Run]  # in one call of the block


class Schedule(NamedTuple):
    everyone: Group
    prompts: list[Group]  # the streams of each prompt
    starts: list[Group]  # the streams of each start state: the groups before the first block
    steps: list[Step]
    ends: list[Run]  # the groups after the last block, each with one prediction per part


def schedule(
    keeps: Sequence[Collection[int]],
    prompts: Sequence[Hashable],
    starts: Sequence[Hashable],
    grads: Sequence[bool],
    num_blocks: int,
) -> Schedule:
    """The schedule of streams that are given by one entry in each list.

    `keeps`: indices of the blocks that run; `prompts`, `starts`: equal keys for equal prompts and equal start states.
    """

    def group(members: Sequence[int]) -> Group:
        return Group(tuple(members), any([grads[i] for i in members]))

    def split(whole: Group, keys: Sequence[Hashable]) -> list[Group]:
        """One group per key, in the order in which the keys appear."""
        found = dict.fromkeys([keys[i] for i in whole.members])
        if len(found) == 1:
            return [whole]
        return [group([i for i in whole.members if keys[i] == key]) for key in found]

    everyone = group(range(len(keeps)))
    groups = first = split(everyone, starts)
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
    return Schedule(everyone, split(everyone, prompts), first, steps, ends)


def read_once(prompts: Iterable[tuple[Key, bool]]) -> dict[Key, bool]:
    """The distinct prompts of a block's parts, in order: a block reads each once, however many parts go on with it.

    The flag says whether the reading carries gradient: it does if one of the parts does.
    """
    out: dict[Key, bool] = {}
    for prompt, grad in prompts:
        out[prompt] = out.get(prompt, False) or grad
    return out
