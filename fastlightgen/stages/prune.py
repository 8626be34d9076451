"""Stage II: one set of weights that works with all blocks (v_u) and without the pruned ones (v_p), Eq. 5 to 7.

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.blocks import draw_keep, read_importance
from fastlightgen.config import GUIDANCES, TEACHER_GUIDANCE, TIMES, ConfigError, Run, TrainingKeys, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.ema import follow
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import Stream, VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.families import depth
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import digest, read_card, save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator
from fastlightgen.stages.build import Builder
from fastlightgen.stages.matching import distance
from fastlightgen.stages.method import Guess, Method, Subject
from fastlightgen.stages.networks import guided_prediction
from fastlightgen.stages.scores import held_out_error
from fastlightgen.stages.teacher import noised

DRAWS, COIN = 2, 3  # the purposes of this stage's random draws


@dataclass(kw_only=True)
class PruneKeys(TrainingKeys):
    """Keys of Stage II."""

    iters: int = field(4000, "optimizer steps", lo=1, everyday=True)
    lr: float = field(1e-5, "learning rate", lo=0, everyday=True)
    alpha: float = field(1.0, "weight of distillation; 1 - alpha weighs the data (Eq. 7)", lo=0, hi=1)
    drop: str = field(
        "joint", "joint: one coin for all pruned blocks; independent: one each", choices=("joint", "independent")
    )
    p: float = field(0.5, "probability that a coin drops its blocks", lo=0, hi=1)
    full_drop_prob: float = field(0.5, "drop=independent: share of steps that drop every pruned block", lo=0, hi=1)
    estimator: str = field(
        "full", "full: both paths every step; sampled: one path, by the coin", choices=("full", "sampled")
    )
    target: str = field(
        "frozen",
        "what both paths follow; frozen: the teacher; self: the unpruned path (Eq. 6 as printed); ema: its average",
        choices=("frozen", "self", "ema"),
    )
    target_decay: float = field(0.999, "target=ema: decay of the average", lo=0, below=1)
    guided: float = field(
        1.0, "guidance of the target: both paths learn null + w (cond - null); 1: the plain prediction", everyday=True
    )
    teacher_guidance: str = field("null", TEACHER_GUIDANCE, choices=GUIDANCES)
    kappa_unpruned: float = field(1.0, "weight of the unpruned path's distance to the target", lo=0)
    text_dropout: float = field(0.1, "probability of the empty prompt, which Eq. 9 needs", lo=0, hi=1)
    guard: float = field(
        1.5, "stop when the unpruned path's held-out error exceeds this multiple of its start", above=1, numbers=False
    )
    guard_every: int = field(50, "steps between two looks at the held-out error", lo=1, numbers=False)
    time: str = field("uniform", "how t is drawn before the shift", choices=TIMES)
    importance: str = field("", "Stage I's ranking; empty: RUN/stage1/importance.json")
    teacher: str = field("", "model folder of the teacher; empty: model")

    def check(self) -> None:
        super().check()
        if self.estimator == "sampled" and self.drop == "independent":
            raise ConfigError(
                "estimator=sampled: the coin belongs to drop=joint; with drop=independent use estimator=full"
            )
        if self.guided != 1 and self.target == "self":
            raise ConfigError(
                f"guided={self.guided}: target=self would guide its own guided prediction again; use target=frozen"
            )
        if self.guided != 1 and self.teacher_guidance == "embedded":
            raise ConfigError(f"guided={self.guided}: teacher_guidance=embedded guides the target too; use guided=1")
        if self.estimator == "sampled" and not 0 < self.p < 1:
            raise ConfigError(f"p={self.p}: estimator=sampled divides by p and 1 - p; wanted > 0 and < 1")

    @property
    def kappa(self) -> float:
        """Weight of the unpruned path's distance; 0 with target=self, where the unpruned path is the target."""
        return 0.0 if self.target == "self" else self.kappa_unpruned

    @property
    def trains_unpruned(self) -> bool:
        """Does any term of Eq. 7 train the unpruned path?"""
        return self.alpha * self.kappa > 0 or self.alpha < 1


class Config(PruneKeys, Run):
    """A configuration of this stage: its own keys and those of every stage."""


def eq7(
    v_p: Tensor | None,
    v_u: Tensor | None,
    v_target: Tensor,
    v_star: Tensor,
    alpha: float,
    kappa: float = 0.0,
    w_p: float = 1.0,
    w_u: float = 1.0,
) -> Tensor:
    """Eq. 7, the sum of Eq. 5 and 6, by path; |.|^2 is the mean over elements, v* = noise - x0 (the sign of Eq. 4).

    Eq. 5: (1 - alpha) |v_p - v*|^2 + (1 - alpha) |v_u - v*|^2
    Eq. 6: alpha |v_p - SG(v_target)|^2, where the paper's target is v_u itself

    The kappa term is not in the paper. Eq. 6 alone pulls the pruned path to a target that shares its weights, which
    runs away at alpha = 1; with a fixed target it damages the unpruned path, Stage III's strong teacher. w_p and w_u
    weigh the paths where a coin picks one of them; a path that is not taken is None.
    """
    target = v_target.detach()
    pruned = alpha * distance(v_p, target) + (1 - alpha) * distance(v_p, v_star)
    unpruned = alpha * kappa * distance(v_u, target) + (1 - alpha) * distance(v_u, v_star)
    return w_p * pruned + w_u * unpruned


class Prune:
    """Stage II for the loop: the student, its frozen or averaged target, and a guard."""

    number = 2
    loss_key, drifts = "loss", False

    def __init__(
        self,
        cfg: Config,
        net: VideoDiT,
        pruned: Sequence[int],
        batches: Callable[[int], Batch],
        held_out: Callable[[], Batch],
        card: dict[str, Any],
        target: VideoDiT | None = None,
    ):
        self.cfg, self.iters, self.card, self.batches, self.held_out = cfg, cfg.iters, card, batches, held_out
        self.net = self.teacher = net  # before the first step the network is the teacher
        self.pruned = list(pruned)
        self.keep = [i for i in range(net.num_blocks) if i not in self.pruned]
        # The target: a copy of the teacher that stays fixed, or follows the network as an average.
        self.target = (target or copy.deepcopy(net)).requires_grad_(False) if cfg.target != "self" else None
        self.frozen = [] if self.target is None else [self.target]
        if still(cfg):  # these blocks get no gradient; a sharded optimizer would still decay their weights
            for i in self.pruned:
                net.blocks[i].requires_grad_(False)
        self.roles = {"student": Role.of(net, cfg, carried=self.target if cfg.target == "ema" else None)}
        self.start_error = 0.0

    def begin(self) -> None:
        # A guided prediction is further from the data than the teacher's own, and its target cannot run away.
        self.start_error = held_out_error(self.net, self.held_out(), self.cfg) if self.cfg.guided == 1 else math.inf

    def updates(self, step: int) -> list[Update]:
        # With alpha = 1 and target=self no term trains the unpruned path: a coin that picks it leaves nothing to do.
        takes_p, takes_u, _ = self.paths(step)
        return [Update("student", lambda: self.loss(step))] if takes_p or takes_u else []

    def paths(self, step: int) -> tuple[float, float, list[int]]:
        """Return the weights of the pruned and the unpruned path in this step, and the blocks of the pruned path.

        `full` takes both paths. `sampled` takes one by a coin and divides its loss by the coin's probability. The draws
        depend on (seed, step) only, so that they are the same on every rank.
        """
        cfg, keep = self.cfg, self.keep
        gen = generator(cfg.seed, COIN, step)
        if cfg.drop == "independent":
            keep = draw_keep(self.pruned, self.net.num_blocks, cfg.p, cfg.full_drop_prob, gen)
        w_p, w_u = 1.0, 1.0
        if cfg.estimator == "sampled":
            heads = torch.rand((), generator=gen).item() < cfg.p
            w_p, w_u = (1 / cfg.p, 0.0) if heads else (0.0, 1 / (1 - cfg.p))
        return w_p, w_u * cfg.trains_unpruned, keep

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 7, from one walk: both paths share everything before the first skipped block."""
        cfg, batch = self.cfg, self.batches(step)
        x_t, t, noise, cond = noised(batch, cfg, cfg.seed, DRAWS, step)
        w_p, w_u, keep = self.paths(step)

        streams: dict[str, Stream] = {}
        if w_p:
            streams["pruned"] = Stream(cond, keep, grad=True)
        if w_u or self.target is None:  # target=self needs the unpruned prediction even in steps that do not train it
            streams["unpruned"] = Stream(cond, grad=w_u > 0)
        v = dict(zip(streams, self.net.walk(x_t, t, list(streams.values())), strict=True))
        if self.target is None:
            v_target = v["unpruned"]
        else:
            v_target = guided_prediction(self.target, x_t, t, cond, batch.null, cfg.guided)
        v_p, v_u = v.get("pruned"), v["unpruned"] if w_u else None
        loss = eq7(v_p, v_u, v_target, flow.velocity(batch.x0, noise), cfg.alpha, cfg.kappa, w_p, w_u)
        taken = {"distill_pruned": v_p, "distill_unpruned": v_u}
        return loss, {name: distance(v.detach(), v_target).item() for name, v in taken.items() if v is not None}

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Move the averaged target; stop a run whose unpruned path has left its teacher (target=self can)."""
        cfg = self.cfg
        if cfg.target == "ema":
            assert self.target is not None
            follow(self.target, self.net, 1 - cfg.target_decay)
        if step % cfg.guard_every:
            return
        error = held_out_error(self.net, self.held_out(), cfg)
        if not error <= cfg.guard * self.start_error:  # also stops at nan
            raise ValueError(
                f"step {step}: the x0 error of the full path is {error:.4g}, {error / self.start_error:.2f} times its "
                f"start, above guard={cfg.guard}; the run has diverged: use target=frozen, a lower lr, or alpha below 1"
            )

    def sampler(self) -> dict[str, Any]:
        return {"model": self.net, "keep": self.keep} | preview_plan(self.card, self.cfg.shift, self.net.released)

    def save(self, folder: Path, write: Callable[..., Any] = save_model) -> None:
        write(self.net, folder, **self.card | {"stage": 2, "pruned_path": self.keep, "shift": self.cfg.shift})


def still(cfg: PruneKeys) -> bool:
    """Return whether the pruned blocks get no gradient: drop=joint and no term that trains the unpruned path."""
    return cfg.drop == "joint" and not cfg.trains_unpruned


def needs(cfg: Config) -> str:
    return "" if cfg.importance else "1"


def ranking_of(cfg: Any) -> Path:
    return Path(cfg.importance or Path(cfg.run) / "stage1" / "importance.json")


def build(cfg: Config, with_: Builder) -> Prune:
    """Build the stage from the teacher's weights, Stage I's ranking, and a copy of the teacher as the target."""
    folder = trained_folder(cfg.teacher or cfg.model)
    net = with_.load(folder)
    ranking = with_.ranking(ranking_of(cfg), net.num_blocks)
    theirs = read_card(folder)
    with_.read_guidance(cfg.teacher_guidance, net, theirs)
    guidance = theirs.get("guidance") if cfg.guided == 1 else 1.0  # a guided target has it in the weights
    card = with_.card(source=str(folder), steps=theirs.get("steps"), guidance=guidance)
    with_.check_data(net, theirs)
    with_.checkpoint(cfg, net)
    target = with_.copy(net, folder) if cfg.target != "self" else None
    stage = Prune(cfg, net, ranking["pruned"], with_.batches, with_.held_out, card, target)
    stage.roles["student"].file_values = with_.file_values(folder)
    return stage


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count the two paths in one walk, and the target's prediction unless the target is the unpruned path."""
    blocks = range(len(net.blocks))
    keep = list(blocks) if cfg.drop == "independent" else keep  # the coins may keep all blocks
    held = [i for i in blocks if i not in keep] if still(cfg) else []
    own_target, u = cfg.target == "self", cfg.trains_unpruned
    # (fraction of the steps, takes the pruned path, trains the unpruned path)
    coins = [(1.0, True, u)] if cfg.estimator == "full" else [(cfg.p, True, False), (1 - cfg.p, False, u)]
    nets, walked, updates = {}, [], 0.0
    for fraction, takes_p, trains_u in coins:
        routes = [Route(keep=keep, grad=True)] if takes_p else []
        if trains_u or (takes_p and own_target):
            routes.append(Route(grad=trains_u))
        if not routes:  # a coin that leaves nothing to train
            continue
        updates += fraction
        walked.append(Walk("student", routes, fraction))
        if not own_target:
            nets["target"] = Net()
            walked.append(Walk("target", [Route(), Route(1)] if cfg.guided != 1 else [Route()], fraction))
    return Iteration({"student": Net(updates=updates, still=held)} | nets, walked)


def subject(cfg: Config, guess: Guess | None = None) -> Subject:
    config = config_of(trained_folder(cfg.teacher or cfg.model))
    if guess and not cfg.importance:
        return config, guess(depth(config))
    return config, read_importance(ranking_of(cfg), depth(config))["kept"]


def inputs(cfg: Config) -> dict[str, Any]:
    ranking = ranking_of(cfg)
    return {"ranking_used": digest(ranking) if ranking.is_file() else None}


METHOD = Method(
    stage="2",
    name="fastlightgen",
    title="After Stage II",
    about="both paths follow the teacher (Eq. 5 to 7)",
    keys=PruneKeys,
    build=build,
    walks=walks,
    subject=subject,
    inputs=inputs,
    needs=needs,
)
