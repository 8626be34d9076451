"""The cost of one walk of a network: the operations, gathers and kept tensors of its schedule, summed up."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import count

from fastlightgen.blocks import check_keep
from fastlightgen.models.cost import Network, Saved, Work
from fastlightgen.models.schedule import Group, read_once, schedule


@dataclass(frozen=True)
class Route:
    """One stream of a walk: which prompt it reads, which blocks it runs, whether it carries gradient."""

    prompt: int = 0
    keep: Sequence[int] | None = None
    grad: bool = False
    kept_text: bool = False  # the prompt's keys and values were computed in an earlier step


@dataclass
class WalkCost:
    """Costs per sample. Operations are floating-point operations, sizes are numbers of elements."""

    forward: float = 0
    backward: float = 0
    recompute: float = 0
    calls: int = 0  # block evaluations
    grad_calls: int = 0
    gathers: int = 0  # blocks visited: a sharded engine gathers the weights of each of them once
    grad_gathers: int = 0  # blocks gathered again for the backward pass, which also scatters their gradients
    gathered: int = 0  # parameters gathered for the forward pass, with those outside the blocks
    grad_gathered: int = 0  # parameters gathered for the backward pass
    boundaries: int = 0  # hidden states that checkpointing keeps: the backward pass recomputes a block from each
    narrow: float = 0  # elements kept for the backward pass in the compute type
    wide: float = 0  # elements kept for the backward pass in float32
    forks: int = 0  # largest number of groups without gradient that are held at the same time

    @property
    def flops(self) -> float:
        return self.forward + self.backward + self.recompute

    def kept_bytes(self, size: int) -> float:
        return self.narrow * size + self.wide * 4

    def joined(self, batches: int) -> "WalkCost":
        """The cost of one walk of several batches of clips, which gathers each block as often as a walk of one."""
        once = {"gathers", "grad_gathers", "gathered", "grad_gathered"}
        each = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in once}
        return replace(self, **{name: value * batches for name, value in each.items()})

    def keep(self, saved: Saved, times: int = 1) -> None:
        self.narrow += saved.narrow * times
        self.wide += saved.wide * times


def walk(
    net: Network,
    paths: Sequence[Route],
    checkpointing: bool = False,
    keep_attention: int = 0,
    adapters: int = 0,
    constant: bool = False,
) -> WalkCost:
    """The cost of `net.walk` for these streams; `keep_attention` as in VideoDiT.

    With `adapters` the weights are frozen and low-rank adapters of that rank train. The blocks also compute the
    adapters' products, no gradients of their own weights, and the layers before the blocks have no backward pass.
    With `constant` nothing trains: the backward pass goes from hidden states to the latent.
    """
    cost = WalkCost()

    def outside(work: Work, grad: bool, after: bool = False, latent: bool = False) -> None:
        """Add layers before or after the blocks."""
        cost.forward += work.forward
        if grad and constant:
            cost.backward += work.forward * latent
        elif grad:
            cost.backward += work.backward if not adapters else work.linear * after

    def inside(work: Work, grad: bool, reads_grad: bool = True) -> float:
        """Add layers of a block; returns the operations of their forward pass."""
        extra = work.linear * adapters * net.blocks[0].widths / net.blocks[0].weights
        cost.forward += work.forward + extra
        if grad and constant:
            cost.backward += (work.linear + 2.5 * work.attention + extra) * reads_grad
        elif grad and not adapters:
            cost.backward += work.backward
        elif grad:
            cost.backward += work.linear * reads_grad + 2.5 * work.attention + 2 * extra
        return work.forward + extra

    prompts = [p.prompt for p in paths]
    kept_text = {p.prompt: p.kept_text for p in paths}
    keeps = [check_keep(p.keep, len(net.blocks)) for p in paths]
    starts = [0 if net.merges else prompt for prompt in prompts]
    plan = schedule(keeps, prompts, starts, [p.grad for p in paths], len(net.blocks))

    # Embed.
    outside(net.tables, plan.everyone.grad)
    if plan.everyone.grad:
        cost.keep(net.saved)
    for group in plan.prompts:
        outside(net.text, group.grad)
    for group in plan.starts:
        outside(net.embed, group.grad, latent=True)

    # Blocks. Each hidden state has a number; the two sides of a fork share one.
    numbers = count()
    states: dict[Group, int] = {group: next(numbers) for group in plan.starts}
    boundaries: set[int] = set()
    for step in plan.steps:
        for fork in step.forks:
            states[fork.inside] = states[fork.outside] = states.pop(fork.group)
        block, in_backward = net.blocks[step.block], any(run.group.grad for run in step.runs)
        cost.gathers += 1
        cost.gathered += block.params
        cost.grad_gathers += in_backward
        cost.grad_gathered += block.params * in_backward
        parts = [part for run in step.runs for part in run.parts]
        for prompt, grad in read_once([(prompts[part.members[0]], part.grad) for part in parts]).items():
            if not kept_text[prompt]:
                inside(block.prompt, grad, reads_grad=False)
            if grad:
                cost.keep(block.prompt_saved)
        cost.calls += len(parts)
        cost.grad_calls += sum(part.grad for part in parts)
        for run in step.runs:
            again = inside(block.shared, run.group.grad) + sum([inside(block.private, p.grad) for p in run.parts])
            start = states.pop(run.group)
            if run.group.grad and checkpointing:
                cost.recompute += again - block.self_attention * (step.block < keep_attention)
                if step.block < keep_attention:
                    cost.keep(block.attention_out)
                boundaries.add(start)
            elif run.group.grad:
                cost.keep(block.saved)
            states.update({part: next(numbers) for part in run.parts})
        cost.forks = max(cost.forks, sum(not group.grad for group in states))

    # Unembed.
    for part in [part for end in plan.ends for part in end.parts]:
        outside(net.unembed, part.grad, after=True)
        if part.grad:
            cost.keep(net.last)

    cost.boundaries = len(boundaries)
    cost.narrow += len(boundaries) * net.hidden
    cost.gathered += net.outside_params * bool(cost.gathers)
    cost.grad_gathered += net.outside_params * bool(cost.grad_gathers)
    return cost
