"""The cost of one iteration of a stage, from the walks that its method declares.

A method declares the networks that it holds (`Net`) and the walks that it takes of them, with their frequency (`Walk`).
This file turns the declaration into operations, gathers, block evaluations and kept tensors. It knows no method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlightgen.blocks import num_dropped
from fastlightgen.config import Plan, method_for
from fastlightgen.models.cost import Network, Saved, Work
from fastlightgen.planner.walk import Route, WalkCost, walk


@dataclass(frozen=True)
class Head:
    """Layers that train with a network and read its hidden states, per clip."""

    params: int
    work: Work
    saved: Saved  # kept for the backward pass
    constant: Saved | None = None  # kept where its weights are constants; None: as much


@dataclass(frozen=True)
class Net:
    """A network that a stage holds, made from the network that it starts from."""

    keep: Sequence[int] | None = None  # its blocks; None: all
    updates: float = 0  # optimizer steps in an iteration; 0: it only predicts
    still: Sequence[int] = ()  # blocks that do not train although the network does
    fixed: bool = False  # its own weights do not train: the head alone does
    adapters: int = 0  # rank of the low-rank adapters that train in the place of its weights
    apart: bool = False  # the weights under the adapters are its own; otherwise they are another network's
    adapted: Sequence[int] | None = None  # blocks whose adapters ever run; None: all
    averaged: bool = False  # its weights have a running average
    drawn: bool = False  # it may start from random weights, which every process draws whole
    head: Head | None = None
    network: Network | None = None  # its cost, if it is not of the widths of the one that the stage starts from


@dataclass(frozen=True)
class Walk:
    """One walk: of which network, by which streams, and how often in an iteration, on the average."""

    net: str
    routes: Sequence[Route]  # one per stream
    times: float = 1.0
    joined: int = 1  # batches of clips in one walk, for example generated and real ones
    head: bool = False  # its hidden states go through the network's head
    # Its weights are constants: gradients flow to the latent alone, at once, while the graph of this network waits.
    beside: str = ""


@dataclass(frozen=True)
class Iteration:
    """One iteration, as a method declares it."""

    nets: Mapping[str, Net]
    walks: Sequence[Walk]
    clips: int = 0  # clips in one walk, if the stage does not divide `batch` among the processes; 0: it does
    count: int = 0  # iterations of all processes together, if the stage has no key `iters`; 0: it has


@dataclass(frozen=True)
class Pass:
    """A declared walk with its cost."""

    net: str
    cost: WalkCost
    times: float = 1.0
    joined: int = 1
    beside: str = ""


@dataclass
class StepCost:
    """An iteration: its walks, the networks that it holds, and the optimizer steps that it takes."""

    net: Network  # the network that the stage starts from; its largest block bounds those of the others
    passes: list[Pass] = field(default_factory=list)
    trained: dict[str, int] = field(default_factory=dict)  # parameters by role
    frozen: dict[str, int] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)  # optimizer steps in an iteration
    averaged: int = 0  # parameters with a running average
    float8: int = 0  # bytes of the float8 copies of all networks' weights (fp8=frozen)
    drawn: bool = False  # may start from random weights
    clips: int = 1  # in one pass of a process (or group of processes)
    accumulation: int = 1  # passes in one optimizer step
    count: int = 0  # see Iteration.count

    def total(self, key: str) -> float:
        """The sum of one number (a field of WalkCost) over the walks of an iteration."""
        return sum(p.times * getattr(p.cost, key) for p in self.passes)

    @property
    def recomputes(self) -> bool:
        """Does a backward pass compute blocks again?"""
        return any(p.cost.boundaries for p in self.passes)

    def activations(self, size: int) -> "Activations":
        """Bytes per clip of the largest walks; `size`: bytes of a number in the compute type."""
        grad = [p for p in self.passes if p.cost.grad_calls]
        kept = max((self.kept_with(p, size) for p in self.passes if not p.beside), default=0.0)
        again = max(b.saved.bytes(size) for b in self.net.blocks) - self.net.last.bytes(size)
        block = max(b.gradients for b in self.net.blocks) * size if grad else 0.0
        if any(p.cost.boundaries for p in grad):
            block += again
        block *= max((p.joined for p in grad), default=1)
        forks = max((p.cost.forks for p in self.passes), default=0)
        states = 2 * forks * self.net.hidden * size  # x and y of a state, its sum left to the next block
        return Activations(kept, block, states, self.without_gradient(size) if len(grad) < len(self.passes) else 0.0)

    def kept_with(self, walked: Pass, size: int) -> float:
        """Bytes per clip that wait for a walk's backward pass, with those of a walk that goes on beside it."""
        beside = [p.cost.kept_bytes(size) for p in self.passes if p.beside == walked.net]
        return walked.cost.kept_bytes(size) + max(beside, default=0.0)

    def without_gradient(self, size: int) -> float:
        """Bytes per clip at the widest moment of a walk without gradient."""
        return max(b.working + b.prompt_saved.narrow for b in self.net.blocks) * size


@dataclass(frozen=True)
class Activations:
    """Bytes per clip. Backward passes follow each other, so only the largest counts.

    A walk without gradient may run while another walk's tensors are kept.
    """

    kept: float  # for a backward pass
    block: float  # one block during the backward pass
    forks: float  # hidden states of both sides of forks
    working: float  # one block without gradient


def dropped(blocks: int, ratio: float, prefix: int = -1) -> list[int]:
    """The blocks that `ratio` drops: a band from `prefix` on (-1: in the middle, where the paper's Fig. 4 has it)."""
    count = num_dropped(blocks, ratio)
    start = (blocks - count) // 2 if prefix < 0 else prefix
    if start + count > blocks:
        raise ValueError(
            f"prefix={prefix}: {count} blocks are dropped from there, but the network has {blocks}; "
            f"wanted at most {blocks - count}"
        )
    return list(range(start, start + count))


def undropped(blocks: int, ratio: float, prefix: int = -1) -> list[int]:
    """The blocks that `dropped` leaves."""
    drop = dropped(blocks, ratio, prefix)
    return [i for i in range(blocks) if i not in drop]


def planned_step(net: Network, plan: Plan, keep: Sequence[int]) -> StepCost:
    """The cost of a planned stage's iteration, with the clips of one process or group."""
    declared: Iteration = method_for(plan).walks(net, keep, plan)
    step = step_cost(net, declared, plan)
    step.clips = declared.clips or plan.micro
    step.accumulation = 1 if declared.clips else plan.accumulation
    step.count = declared.count
    return step


def own_cost(net: Network, held: Net) -> Network:
    """The cost of a network that a stage holds, made from the network `net` that it starts from."""
    whole = held.network or net
    return whole if held.keep is None else whole.prune(held.keep)


def step_cost(net: Network, declared: Iteration, cfg: Any) -> StepCost:
    """The cost per clip of a declared iteration; `cfg` holds the keys of the stage."""
    step = StepCost(net)
    for name, held in declared.nets.items():
        whole = own_cost(net, held)
        # Every network predicts without gradient at some time: as target or teacher, in rollouts, clips, guards.
        if vars(cfg).get("fp8") == "frozen" and (held.apart or not held.adapters):
            step.float8 += sum(b.float8 for b in whole.blocks)
        if not held.updates:
            step.frozen[name] = whole.params
            continue
        step.updates[name] = held.updates
        step.drawn |= held.drawn
        if held.adapters:  # every block has them; those of blocks that never run do not train
            run = range(len(whole.blocks)) if held.adapted is None else held.adapted
            train = whole.prune(run).adapters(held.adapters)
            step.frozen |= {f"{name}'s weights": whole.params} if held.apart else {}
            if idle := whole.adapters(held.adapters) - train:
                step.frozen["idle adapters"] = idle
        elif held.fixed:
            train, step.frozen[f"{name}'s network"] = 0, whole.params
        else:
            train = whole.params - sum(net.blocks[i].params for i in held.still)
            step.frozen |= {"dropped blocks": whole.params - train} if held.still else {}
        train += held.head.params if held.head else 0
        step.trained[name] = train
        step.averaged += train if held.averaged else 0
    for declared_walk in declared.walks:
        held = declared.nets[declared_walk.net]
        whole = own_cost(net, held)
        keys = vars(cfg) if any(route.grad for route in declared_walk.routes) else {}
        again, outputs = keys.get("checkpointing", False), keys.get("keep_attention", 0)
        cost = walk(whole, declared_walk.routes, again, outputs, held.adapters, bool(declared_walk.beside))
        if declared_walk.head:
            assert held.head is not None
            work = held.head.work
            cost.forward += work.forward
            cost.backward += work.linear if declared_walk.beside else work.backward
            fixed = held.head.constant if declared_walk.beside else None
            cost.keep(fixed or held.head.saved)
        cost = cost.joined(declared_walk.joined)
        step.passes.append(
            Pass(declared_walk.net, cost, declared_walk.times, declared_walk.joined, declared_walk.beside)
        )
    return step
