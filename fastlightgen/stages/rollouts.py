"""The student's own clips, on which both networks of Stage III train, and the order of the updates of the two.

The student goes down a ladder of times, from noise. At each rung it estimates x0; the estimate at one rung is a clip.

Shapes: x, x0, x_hat, v [B, C, F, H, W].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.models.experts import Model
from fastlightgen.rng import generator, normal_like, rows

STUDENT, FAKE, RUNGS, WALK = 5, 6, 12, 13  # the purposes of the random draws


class Keys(Protocol):
    """The keys of a method that this file reads; the method documents them."""

    seed: int
    batch: int
    rollout: str
    rollouts: str
    rungs: str
    sampler: str


Path = tuple[flow.Predict, Tensor, list[float], str, Callable[[int], Tensor]]


@dataclass(frozen=True)
class Order:
    """The order of the updates. Updates of the student and of the critic are counted apart, each from 0.

    Student update g comes right before critic update critic_start + g * ratio.
    """

    ratio: int  # critic updates per update of the student
    critics_per_step: int  # critic updates in an iteration
    critic_start: int = 0  # critic updates before the first update of the student, a multiple of ratio

    def critics(self, step: int) -> range:
        """Return the numbers of the critic updates of an iteration."""
        return range(step * self.critics_per_step, (step + 1) * self.critics_per_step)

    def student(self, step: int) -> int | None:
        """Return the number of the student's update of an iteration; None: it has none."""
        g, rest = divmod(self.critics(step).start - self.critic_start, self.ratio)
        return g if g >= 0 and rest == 0 else None

    def next_critic(self, g: int) -> int:
        """Return the number of the critic update that follows the student's update g."""
        return self.critic_start + g * self.ratio

    def next_student(self, c: int) -> int:
        """Return the number of the student's update that follows critic update c; below 0 early in critic_start."""
        return (c - self.critic_start) // self.ratio + 1


class Clips(NamedTuple):
    """Clips of the student, the batch whose prompts they have, and the rung (from 0) at which they left the ladder."""

    x_hat: Tensor
    batch: Batch
    rung: int


class Walk(NamedTuple):
    """The student's way down the whole ladder: its input and its x0 estimate at each rung."""

    batch: Batch
    inputs: list[Tensor]
    x0: list[Tensor]


class Rollouts:
    """Makes the clips for the updates of a student and its critic. All draws depend on (seed, number of the update).

    rollouts=fresh: every update has prompts and a rollout of its own, down to its exit rung.
    rollouts=shared: `ratio` critic updates and then the student's next update g share one batch of prompts and one walk
    down the whole ladder. The critic takes the x0 estimates at its rungs. The student takes its input at its exit rung
    and computes only this step again, with gradient.

    All these updates see clips of the current student, because it changes only in the last of them. A checkpoint
    between them contains the same student. So a resumed run repeats the walk with the same bits, from the seed, and no
    checkpoint has to store it.
    """

    def __init__(
        self,
        cfg: Keys,
        order: Order,
        student: Model,
        times: Sequence[float],
        batches: Callable[[int], Batch],
        own: range | None = None,
    ):
        """`own`: the rungs at which the trained network predicts; None: all. A partner takes those before them."""
        self.own = range(len(times)) if own is None else own
        self.cfg, self.order, self.student, self.batches = cfg, order, student, batches
        self.times = times[: self.own.stop]
        self.shared = cfg.rollouts == "shared"
        self.walks: dict[range, Walk] = {}  # of update `walked`: this process's share of the clips -> their walk
        self.walked: int | None = None

    def for_student(self, g: int, gen: torch.Generator) -> Clips:
        """Return the clips of the student's update g; the last step of the student carries gradient."""
        rung = self.rung(STUDENT, g, gen)
        if self.shared:
            batch, inputs, _ = self.walk(g)
            t = self.times[rung]
            return Clips(inputs[rung] - t * self.student(inputs[rung], t, batch.cond), batch, rung)
        batch = self.batches(self.order.next_critic(g))
        return Clips(self.simulate(batch, rung, gen), batch, rung)

    @torch.no_grad()
    def for_critic(self, c: int, gen: torch.Generator) -> Clips:
        """Return the clips of critic update c."""
        rung = self.rung(FAKE, c, gen)
        if self.shared:
            batch, _, x0 = self.walk(self.order.next_student(c))
            return Clips(x0[rung], batch, rung)
        batch = self.batches(c)
        return Clips(self.simulate(batch, rung, gen), batch, rung)

    def walk(self, g: int) -> Walk:
        """Return the shared walk that ends with the student's update g, of the clips of this process's share.

        With micro-batches every share has a walk, which is kept until the next update of the student.
        """
        if g != self.walked:
            self.walked, self.walks = g, {}
        share = rows(self.cfg.batch)
        if share not in self.walks:
            self.walks[share] = self.walk_down(g)
        return self.walks[share]

    @torch.no_grad()
    def walk_down(self, g: int) -> Walk:
        """Walk the whole ladder; rollout=data: start anew at each rung, from noised clips of the data."""
        number = g - min(0, self.order.next_student(0))  # counts all walks from 0, those of the critic's start too
        cfg, batch, gen = self.cfg, self.batches(number), generator(self.cfg.seed, WALK, number)
        noise = x = normal_like(batch.x0, gen)
        inputs, x0 = list[Tensor](), list[Tensor]()
        for rung, t in enumerate(self.times):
            if cfg.rollout == "data":
                x = flow.add_noise(batch.x0, noise, t)
                if rung not in self.own:  # nobody reads what would follow from it
                    inputs.append(x)
                    x0.append(x)
                    continue
            v = self.student(x, t, batch.cond)
            inputs.append(x)
            x0.append(x - t * v)
            if rung + 1 < len(self.times):
                x = flow.descend(x, v, t, self.times[rung + 1], cfg.sampler, lambda: normal_like(noise, gen))
        return Walk(batch, inputs, x0)

    def rung(self, purpose: int, number: int, gen: torch.Generator) -> int:
        """Return the exit rung of an update, an own one: one for the whole batch, the same on every rank.

        rungs=cycled: each cycle of N updates leaves once at each of the N rungs, in an order of its own. With one order
        for all cycles, a log of every second update would show the same half of the rungs for ever.
        """
        count = len(self.own)
        if self.cfg.rungs == "random":
            return self.own[int(torch.randint(count, (), generator=gen))]
        cycle, place = divmod(number, count)
        return self.own[int(torch.randperm(count, generator=generator(self.cfg.seed, RUNGS, purpose, cycle))[place])]

    def input_for_student(self, g: int, gen: torch.Generator) -> Clips:
        """Return the inputs of the student's last step in its update g, in place of the clips that this step makes."""
        rung = self.rung(STUDENT, g, gen)
        if self.shared:
            batch, inputs, _ = self.walk(g)
            return Clips(inputs[rung], batch, rung)
        batch = self.batches(self.order.next_critic(g))
        return Clips(flow.arrive(*self.path(batch, rung, gen)), batch, rung)

    def simulate(self, batch: Batch, rung: int, gen: torch.Generator) -> Tensor:
        """Backward simulation with early exit: return the student's x0 at a rung. Only the last step carries gradient.

        With rollout=simulate the student itself walks from noise down to the rung; with rollout=data it starts there
        from noised clips of the data.
        """
        return flow.rollout(*self.path(batch, rung, gen))

    def path(self, batch: Batch, rung: int, gen: torch.Generator) -> Path:
        """The student's way down to a rung, as arguments of `flow.rollout` and `flow.arrive`."""
        noise = normal_like(batch.x0, gen)
        walked, x = list(self.times[: rung + 1]), noise
        if self.cfg.rollout == "data":
            walked, x = walked[-1:], flow.add_noise(batch.x0, noise, self.times[rung])
        student, cond = self.student, batch.cond
        return (
            lambda x, t: student(x, t, cond),
            x,
            walked,
            self.cfg.sampler,
            lambda _: normal_like(noise, gen),
        )
