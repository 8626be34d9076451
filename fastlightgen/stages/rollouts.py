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
from fastlightgen.models.base import VideoDiT
from fastlightgen.rng import generator, normal_like

STUDENT, FAKE, RUNGS = 5, 6, 12  # the purposes of the random draws


class Keys(Protocol):
    """The keys of a method that this file reads; the method documents them."""

    seed: int
    rollout: str
    rungs: str
    sampler: str


@dataclass(frozen=True)
class Order:
    """The order of the updates. Updates of the student and of the critic are counted apart, each from 0.

    Student update g comes right before critic update g * ratio.
    """

    ratio: int  # critic updates per update of the student
    critics_per_step: int  # critic updates in an iteration

    def critics(self, step: int) -> range:
        """Return the numbers of the critic updates of an iteration."""
        return range(step * self.critics_per_step, (step + 1) * self.critics_per_step)

    def student(self, step: int) -> int | None:
        """Return the number of the student's update of an iteration; None: it has none."""
        g, rest = divmod(self.critics(step).start, self.ratio)
        return g if rest == 0 else None

    def next_critic(self, g: int) -> int:
        """Return the number of the critic update that follows the student's update g."""
        return g * self.ratio


class Clips(NamedTuple):
    """Clips of the student, the batch whose prompts they have, and the rung (from 0) at which they left the ladder."""

    x_hat: Tensor
    batch: Batch
    rung: int


class Rollouts:
    """Makes the clips for the updates of a student and its critic. All draws depend on (seed, number of the update)."""

    def __init__(
        self,
        cfg: Keys,
        order: Order,
        student: VideoDiT,
        times: Sequence[float],
        batches: Callable[[int], Batch],
    ):
        self.cfg, self.order, self.student, self.times, self.batches = cfg, order, student, times, batches

    def for_student(self, g: int, gen: torch.Generator) -> Clips:
        """Return the clips of the student's update g; the last step of the student carries gradient."""
        batch = self.batches(self.order.next_critic(g))
        rung = self.rung(STUDENT, g, gen)
        return Clips(self.simulate(batch, rung, gen), batch, rung)

    @torch.no_grad()
    def for_critic(self, c: int, gen: torch.Generator) -> Clips:
        """Return the clips of critic update c."""
        batch = self.batches(c)
        rung = self.rung(FAKE, c, gen)
        return Clips(self.simulate(batch, rung, gen), batch, rung)

    def rung(self, purpose: int, number: int, gen: torch.Generator) -> int:
        """Return the exit rung of an update: one for the whole batch, the same on every rank.

        rungs=cycled: each cycle of N updates leaves once at each of the N rungs, in an order of its own. With one order
        for all cycles, a log of every second update would show the same half of the rungs for ever.
        """
        count = len(self.times)
        if self.cfg.rungs == "random":
            return int(torch.randint(count, (), generator=gen))
        cycle, place = divmod(number, count)
        return int(torch.randperm(count, generator=generator(self.cfg.seed, RUNGS, purpose, cycle))[place])

    def simulate(self, batch: Batch, rung: int, gen: torch.Generator) -> Tensor:
        """Backward simulation with early exit: return the student's x0 at a rung. Only the last step carries gradient.

        With rollout=simulate the student itself walks from noise down to the rung; with rollout=data it starts there
        from noised clips of the data.
        """
        noise = normal_like(batch.x0, gen)
        walked, x = list(self.times[: rung + 1]), noise
        if self.cfg.rollout == "data":
            walked, x = walked[-1:], flow.add_noise(batch.x0, noise, self.times[rung])
        student, cond = self.student, batch.cond
        return flow.rollout(
            lambda x, t: student(x, t, cond), x, walked, self.cfg.sampler, lambda _: normal_like(noise, gen)
        )
