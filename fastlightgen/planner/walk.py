"""What one walk of a network costs: the grouping of `VideoDiT.walk`, with arithmetic in the place of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastlightgen.models.cost import Network, Saved, Work


@dataclass(frozen=True)
class Path:
    """One stream of a walk: which prompt it reads, which blocks it runs, whether it carries gradient."""

    prompt: int = 0
    keep: Sequence[int] | None = None
    grad: bool = False
    kept_text: bool = False  # the prompt's keys and values were computed in an earlier step


@dataclass
class WalkCost:
    """Per sample: operations; evaluations; gathers, one for a block's weights; parameters gathered; tensors kept."""

    forward: float = 0
    backward: float = 0
    recompute: float = 0
    calls: int = 0  # block evaluations
    grad_calls: int = 0
    gathers: int = 0  # blocks visited: a sharded engine gathers each of them once
    grad_gathers: int = 0  # gathered again for the backward pass, which also scatters their gradients
    gathered: int = 0  # parameters, with those outside the blocks
    grad_gathered: int = 0
    boundaries: int = 0  # hidden states that the backward pass starts a block from
    narrow: float = 0  # elements kept for the backward pass in the compute type, and in float32
    wide: float = 0
    forks: int = 0  # most groups of streams without gradient that are held at the same time

    @property
    def flops(self) -> float:
        return self.forward + self.backward + self.recompute

    def kept_bytes(self, size: int) -> float:
        return self.narrow * size + self.wide * 4

    def keep(self, saved: Saved, times: int = 1) -> None:
        self.narrow += saved.narrow * times
        self.wide += saved.wide * times


def walk(
    net: Network, paths: Sequence[Path], checkpointing: bool = False, keep_attention: int = 0, rank: int = 0
) -> WalkCost:
    """The cost of `net.walk` for these streams; `keep_attention` as in VideoDiT.

    With a rank the weights are frozen and low-rank adapters train: the blocks' layers then take the adapters' products
    as well, make no gradient of their own weights, and what comes before the blocks has no backward pass.
    """
    cost, states = WalkCost(), set()
    grads = [p.grad for p in paths]
    prompts = [p.prompt for p in paths]
    keeps = [set(range(len(net.blocks)) if p.keep is None else p.keep) for p in paths]

    def split(members: Sequence[int], keys: Sequence) -> list[list[int]]:
        return [[i for i in members if keys[i] == key] for key in dict.fromkeys(keys[i] for i in members)]

    def grad(members: Sequence[int]) -> bool:
        return any(grads[i] for i in members)

    def outside(work: Work, members: Sequence[int], after: bool = False) -> None:
        cost.forward += work.forward
        if grad(members):
            cost.backward += work.backward if not rank else work.linear * after

    def inside(work: Work, members: Sequence[int], reads_grad: bool = True) -> float:
        extra = work.linear * rank * net.blocks[0].widths / net.blocks[0].weights
        cost.forward += work.forward + extra
        if grad(members) and not rank:
            cost.backward += work.backward
        elif grad(members):
            cost.backward += work.linear * reads_grad + 2.5 * work.attention + 2 * extra
        return work.forward + extra

    everyone = range(len(paths))
    outside(net.tables, everyone)
    if grad(everyone):
        cost.keep(net.saved)
    for members in split(everyone, prompts):
        outside(net.text, members)
    starts = [everyone] if net.merges else split(everyone, prompts)
    groups = [(list(members), object()) for members in starts]  # with a mark for the state that they share
    for members, _ in groups:
        outside(net.embed, members)

    for index, block in enumerate(net.blocks):
        running = [([i for i in g if index in keeps[i]], state) for g, state in groups]
        waiting = [([i for i in g if index not in keeps[i]], state) for g, state in groups]
        running, waiting = ([(g, s) for g, s in side if g] for side in (running, waiting))
        if not running:
            continue
        present = [i for g, _ in running for i in g]
        cost.gathers += 1
        cost.gathered += block.params
        cost.grad_gathers += grad(present)
        cost.grad_gathered += block.params * grad(present)
        for members in split(present, prompts):
            if not all(paths[i].kept_text for i in members):
                inside(block.prompt, members, reads_grad=False)
            if grad(members):
                cost.keep(block.prompt_saved)
        for members, state in running:
            parts = split(members, prompts)
            again = inside(block.shared, members) + sum([inside(block.private, part) for part in parts])
            cost.calls += len(parts)
            cost.grad_calls += sum(map(grad, parts))
            if grad(members) and checkpointing:
                cost.recompute += again - block.self_attention * (index < keep_attention)
                if index < keep_attention:
                    cost.keep(block.attention_out)
                states.add(state)
            elif grad(members):
                cost.keep(block.saved)
            waiting = waiting + [(part, object()) for part in parts]
        groups = waiting
        cost.forks = max(cost.forks, sum(not grad(g) for g, _ in groups))
    for members, _ in groups:
        for part in split(members, prompts):
            outside(net.unembed, part, after=True)
            if grad(part):
                cost.keep(net.last)
    cost.boundaries = len(states)
    cost.narrow += len(states) * net.hidden
    cost.gathered += net.outside_params * bool(cost.gathers)
    cost.grad_gathered += net.outside_params * bool(cost.grad_gathers)
    return cost
