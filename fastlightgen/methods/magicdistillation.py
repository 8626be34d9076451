"""method=magicdistillation: weak-to-strong distribution matching (Shao et al., 2503.13319).

One frozen network and one set of low-rank adapters make both scores. The critic is the network with the adapters at
alpha_strong. The real score comes from the network moved a little towards the critic: the same adapters at alpha_weak.
So the two scores stay comparable where a student of few steps has left the data. Two further terms hold the student to
real clips: a discriminator in the critic, and the distance of its estimates for noised real clips to these clips.

Values that no source gives are ours: alpha_weak, lora_rank, gt, gan, and the form of the ground-truth term.
Shapes: x0, x_hat, x_t, noise, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlightgen import flow
from fastlightgen.config import field
from fastlightgen.models.cost import Network
from fastlightgen.models.lora import attach_lora
from fastlightgen.parallel.log import say
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import discriminator, rival
from fastlightgen.stages.adversarial import Adversarial, AdversarialConfig, AdversarialKeys, critic_walks, twice
from fastlightgen.stages.build import Builder
from fastlightgen.stages.experts import partner, partner_net, rollout_walks
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import Method
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.rollouts import STUDENT

ADAPTERS, HEADS, TRUTH = 7, 16, 18  # the purposes of this file's random draws


@dataclass(kw_only=True)
class MagicKeys(rival.RivalKeys, AdversarialKeys):
    """Keys of MagicDistillation."""

    lora_rank: int = field(64, "rank of the critic's adapters", lo=1, hi=10_000)
    alpha_strong: float = field(1.0, "strength of the adapters in the critic", above=0)
    alpha_weak: float = field(
        0.25, "strength of the same adapters in the real network, which guidance then steers; 0: none", lo=0, hi=1
    )
    gt: float = field(
        0.25, "weight of the distance between the student's x0 estimates for noised real clips and these clips", lo=0
    )

    @property
    def adapters(self) -> int:
        return self.lora_rank


class Config(MagicKeys, AdversarialConfig):
    """A configuration of this method: its own keys and those of every stage."""


def ground_truth_loss(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """The mean over elements of |f(x_tau, tau) - x0|^2, f the student's x0 estimate for a real clip noised to tau."""
    return distance(x0_hat, x0)


class Magic(Adversarial):
    """The student, and the network that is critic and teacher, for the loop."""

    cfg: Config

    def student_loss(self, g: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 8 between the two strengths of the adapters, plus gan times -log D, plus gt times the ground-truth term.

        One walk of the student makes its clips and its estimates for the real ones, both at the exit rung.
        """
        cfg = self.cfg
        gen = generator(cfg.seed, STUDENT, self.order.next_critic(g))
        if not cfg.gt:
            return self.matched(*self.rollouts.for_student(g, gen), gen)
        x, batch, rung = self.rollouts.input_for_student(g, gen)
        tau = self.times[rung]
        noise = normal_like(batch.x0, generator(cfg.seed, TRUTH, g))
        both = torch.cat([x, flow.add_noise(batch.x0, noise, tau)])
        x_hat, x0_hat = (both - tau * self.student(both, tau, twice(batch.cond, len(x)))).chunk(2)
        truth = ground_truth_loss(x0_hat, batch.x0)
        loss, record = self.matched(x_hat, batch, rung, gen)
        return loss + cfg.gt * truth, record | {"gt": truth.item()}


def build(cfg: Config, with_: Builder) -> Magic:
    pair = rival.pair(cfg, with_)
    trained = nn.ModuleDict({"adapters": attach_lora(pair.teacher, cfg.lora_rank, generator(cfg.seed, ADAPTERS))})
    judge = None
    if cfg.gan:
        judge = discriminator.attach(pair.teacher, cfg.gan_features, generator(cfg.seed, HEADS))
        trained["discriminator"] = judge
    with_.checkpoint(cfg, pair.student, pair.teacher)
    say(f"learning rates: student {cfg.own_lr:g}, critic {cfg.critic_lr:g}; guidance of the teacher {pair.scale:g}")
    nets = Networks(pair.student, pair.teacher, None, pair.teacher, None, trained, True, None, pair.read)
    nets.discriminator, nets.trained = judge, pair.trained
    nets.alpha_strong, nets.alpha_weak = cfg.alpha_strong, cfg.alpha_weak
    nets.partner = partner(cfg, with_)
    stage = Magic(cfg, nets, pair, with_.batches, pair.card(with_))
    stage.roles["student"].file_values = pair.values(with_)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the rollouts, the student's update with its two kinds of clips, and the critic's."""
    students, critics = cfg.updates
    head = discriminator.cost(net, len(net.blocks), cfg.gan_features) if cfg.gan else None
    nets = {
        "student": rival.student_net(cfg, net, keep, updates=students, averaged=cfg.ema > 0),
        "fake": Net(updates=critics, adapters=cfg.lora_rank, head=head),
        "teacher": Net(),
    }
    nets |= partner_net(cfg, net, nets["student"])
    # At alpha_weak the adapters change the keys and values of the null prompt with every update of the critic.
    real, kept_text = ("fake", False) if cfg.alpha_weak else ("teacher", True)
    walked = [
        *rollout_walks(cfg),
        Walk("student", [Route(grad=True)], students, joined=2 if cfg.gt else 1),
        Walk(real, rival.predictions(cfg, kept_text=kept_text), students),
        *critic_walks(cfg, students, critics),
    ]
    return Iteration(nets, walked)


METHOD = Method(
    stage="3",
    name="magicdistillation",
    title="MagicDistillation",
    about="distribution matching between two strengths of the critic's adapters, with real clips as a second teacher",
    keys=MagicKeys,
    build=build,
    walks=walks,
    subject=rival.subject,
    inputs=rival.inputs,
    needs=rival.needs,
)
