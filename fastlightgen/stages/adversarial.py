"""Distribution matching with an adversarial term: the critic's discriminator tells the student's clips from real ones.

The student's clips and real ones of the same prompts are noised with the same noise to the same times.
Shapes: x0, x_hat, x_t, noise, v [B, C, F, H, W]; t [B]; logits [heads, B].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import field
from fastlightgen.data.source import Batch
from fastlightgen.models.base import Cond
from fastlightgen.models.constant import constant
from fastlightgen.planner.step import Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator
from fastlightgen.stages.discriminator import discriminator_loss, generator_loss
from fastlightgen.stages.guided import eq8, renoised
from fastlightgen.stages.keys import MatchingKeys
from fastlightgen.stages.matching import dmd_loss
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.rival import Pair
from fastlightgen.stages.rollouts import FAKE
from fastlightgen.stages.student import Matching, MatchingConfig, look
from fastlightgen.stages.teacher import flow_matching_loss


@dataclass(kw_only=True)
class AdversarialKeys(MatchingKeys):
    """Keys of the adversarial term."""

    gan: float = field(5e-3, "weight of the adversarial term in the student's loss; 0: no discriminator", lo=0)
    gan_critic: float = field(1e-2, "weight of the discriminator's loss in the critic's loss", lo=0)
    gan_features: int = field(
        3, "blocks of the critic, from the middle to the last, that its discriminator reads", lo=1
    )


class AdversarialConfig(AdversarialKeys, MatchingConfig):
    """These keys and those of every stage; for type annotations."""


class Adversarial(Matching):
    """Distribution matching for the loop, with a discriminator in the critic, or without one (gan=0)."""

    cfg: AdversarialConfig

    def __init__(
        self, cfg: AdversarialConfig, nets: Networks, pair: Pair, batches: Callable[[int], Batch], card: dict[str, Any]
    ):
        super().__init__(cfg, nets, batches, card)
        self.scale = pair.scale

    def matched(self, x_hat: Tensor, batch: Batch, rung: int, gen: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Eq. 8 for the student's clips x_hat, with a plainly guided teacher, plus gan times the adversarial loss.

        v_real = v(null) + w (v(c) - v(null)) is Eq. 9 with beta1 = w and beta2 = 0.
        """
        cfg, x0 = self.cfg, x_hat.detach()
        t, x_t, noise = renoised(cfg, x0, gen)
        v_fake, adversarial, push = self.scored(x0, t, noise, batch.cond)
        v_c, v_n = self.nets.plain(x_t, t, batch, self.scale)
        gradient, normaliser = eq8(cfg, x0, x_t, t, v_fake, v_c, v_n, v_c, self.scale, 0.0)
        loss, record = dmd_loss(x_hat, gradient), look(x0, batch, normaliser, rung)
        if cfg.gan:
            loss = loss + cfg.gan * pushed(x_hat, adversarial, push)
            record["gan"] = adversarial.item()
        return loss, record

    def scored(self, x0: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """The critic's prediction for the student's noised clips; the adversarial loss and its gradient for x0.

        The gradient goes through the critic, whose weights are constants here, so that the student's graph and the
        critic's are never one: each belongs to another optimizer.
        """
        if not self.cfg.gan:
            with torch.no_grad():
                return self.nets.fake(flow.add_noise(x0, noise, t), t, cond), x0.new_zeros(()), torch.zeros_like(x0)
        with constant(self.nets.fake_net):
            x = x0.clone().requires_grad_(True)
            v, logits = self.nets.judged(flow.add_noise(x, noise, t), t, cond)
            loss = generator_loss(logits)
            (gradient,) = torch.autograd.grad(loss, x)
        return v.detach(), loss.detach(), gradient

    def critic_loss(self, c: int) -> tuple[Tensor, dict[str, float]]:
        """Flow matching on the student's clips, plus gan_critic times the discriminator's loss.

        One walk has both kinds of clips: a sharded engine reduces a block's gradients once per backward pass.
        """
        cfg = self.cfg
        if not cfg.gan:
            return super().critic_loss(c)
        gen = generator(cfg.seed, FAKE, c)
        x_hat, batch, _ = self.rollouts.for_critic(c, gen)
        t, x_t, noise = renoised(cfg, x_hat, gen)
        both = torch.cat([x_t, flow.add_noise(batch.x0, noise, t)])
        v, logits = self.nets.judged(both, torch.cat([t, t]), twice(batch.cond, len(t)))
        fake, real = logits.chunk(2, 1)
        matching, judging = flow_matching_loss(v[: len(t)], x_hat, noise), discriminator_loss(real, fake)
        record = {"flow": matching.item(), "gan": judging.item()}
        record |= {"real": torch.sigmoid(real).mean().item(), "generated": torch.sigmoid(fake).mean().item()}
        return matching + cfg.gan_critic * judging, record


def pushed(x_hat: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
    """A loss of this value whose gradient with respect to x_hat is `gradient`."""
    return loss + ((x_hat - x_hat.detach()) * gradient).sum()


def twice(cond: Cond, size: int) -> Cond:
    """The conditions of `size` clips, twice; what all clips share stays single."""
    return cond.map(lambda x: torch.cat([x, x]) if len(x) == size else x)


def critic_walks(cfg: AdversarialConfig, students: float, critics: float) -> list[Walk]:
    """The critic's walks in an iteration, for the planner."""
    if not cfg.gan:
        return [Walk("fake", [Route()], students), Walk("fake", [Route(grad=True)], critics)]
    return [
        Walk("fake", [Route(grad=True)], students, head=True, beside="student"),
        Walk("fake", [Route(grad=True)], critics, joined=2, head=True),
    ]
