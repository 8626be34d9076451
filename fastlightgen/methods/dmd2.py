"""method=dmd2: distribution matching under a plainly guided teacher, with a discriminator (Yin et al., 2405.14867).

The real score is that of the unpruned teacher with one guidance scale w. Eq. 8 compares it with the critic's, which is
a copy of the teacher. Shapes: x0, x_hat, x_t, noise, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastlightgen.config import field
from fastlightgen.models.cost import Network
from fastlightgen.parallel.log import say
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator
from fastlightgen.stages import discriminator, rival
from fastlightgen.stages.adversarial import Adversarial, AdversarialConfig, AdversarialKeys, critic_walks
from fastlightgen.stages.build import Builder
from fastlightgen.stages.experts import partner, partner_net, rollout_walks
from fastlightgen.stages.method import Method
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.rollouts import STUDENT

HEADS = 16  # the purpose of the discriminator's first values


@dataclass(kw_only=True)
class Dmd2Keys(rival.RivalKeys, AdversarialKeys):
    """Keys of DMD2."""

    fake_arch: str = field(
        "full",
        "blocks of the critic; full: a copy of the teacher; pruned: a copy of the student as it starts",
        choices=("full", "pruned"),
    )


class Config(Dmd2Keys, AdversarialConfig):
    """A configuration of this method: its own keys and those of every stage."""


class Dmd2(Adversarial):
    """The student, its critic and their frozen teacher for the loop."""

    cfg: Config

    def student_loss(self, g: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 8 on clips that the student's own steps make (DMD2, Sec. 4.5), plus the GAN (Sec. 4.3)."""
        gen = generator(self.cfg.seed, STUDENT, self.order.next_critic(g))
        return self.matched(*self.rollouts.for_student(g, gen), gen)


def build(cfg: Config, with_: Builder) -> Dmd2:
    pair = rival.pair(cfg, with_)
    full = cfg.fake_arch == "full"
    start, keep = (pair.folder, None) if full else (pair.start, pair.path)
    fake = with_.copy(pair.teacher, pair.folder) if full else with_.load(pair.start).prune(pair.path)
    fake.requires_grad_(True)
    judge = discriminator.attach(fake, cfg.gan_features, generator(cfg.seed, HEADS)) if cfg.gan else None
    with_.checkpoint(cfg, pair.student, fake)
    say(f"learning rates: student {cfg.own_lr:g}, critic {cfg.critic_lr:g}; guidance of the teacher {pair.scale:g}")
    nets = Networks(pair.student, pair.teacher, None, fake, None, fake, False, None, pair.read)
    nets.discriminator, nets.trained = judge, pair.trained
    nets.partner = partner(cfg, with_)
    stage = Dmd2(cfg, nets, pair, with_.batches, pair.card(with_))
    stage.roles["student"].file_values = pair.values(with_)
    stage.roles["fake"].file_values = discriminator.with_heads(with_.file_values(start, keep), judge)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the rollouts, the student's update under the guided teacher, and the critic's."""
    students, critics = cfg.updates
    own = rival.blocks(cfg, keep)
    judging = own if cfg.fake_arch == "pruned" else None
    depth = len(net.blocks) if judging is None else len(judging)
    head = discriminator.cost(net, depth, cfg.gan_features) if cfg.gan else None
    nets = {
        "student": rival.student_net(cfg, net, keep, updates=students, averaged=cfg.ema > 0),
        "fake": Net(updates=critics, head=head)
        if judging is None
        else rival.like_student(cfg, net, keep, updates=critics, head=head),
        "teacher": Net(),
    }
    nets |= partner_net(cfg, net, nets["student"])
    walked = [
        *rollout_walks(cfg),
        Walk("student", [Route(grad=True)], students),
        Walk("teacher", rival.predictions(cfg, kept_text=True), students),
        *critic_walks(cfg, students, critics),
    ]
    return Iteration(nets, walked)


METHOD = Method(
    stage="3",
    name="dmd2",
    title="DMD2",
    about="distribution matching under the plainly guided, unpruned teacher, with a discriminator",
    keys=Dmd2Keys,
    build=build,
    walks=walks,
    subject=rival.subject,
    inputs=rival.inputs,
    needs=rival.needs,
    savings=({"fake_arch": "pruned"},),
)
