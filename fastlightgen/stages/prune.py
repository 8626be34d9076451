"""Stage II: one set of weights that works with all blocks (v_u) and without the pruned ones (v_p).

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.blocks import draw_keep
from fastlightgen.data.source import Batch
from fastlightgen.engine.ema import follow
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import Stream, VideoDiT
from fastlightgen.models.folder.weights import save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.rank import x0_error
from fastlightgen.stages.teacher import noised


def pruned_terms(v_p: Tensor, v_target: Tensor, v_star: Tensor, alpha: float) -> Tensor:
    """Eq. 7, the pruned path: alpha |v_p - SG(target)|^2 (Eq. 6) + (1 - alpha) |v_p - v*|^2 (Eq. 5)."""
    return alpha * mse(v_p, v_target.detach()) + (1 - alpha) * mse(v_p, v_star)


def unpruned_terms(v_u: Tensor, v_target: Tensor, v_star: Tensor, alpha: float, kappa: float) -> Tensor:
    """The part that trains the full path: (1 - alpha) |v_u - v*|^2 (Eq. 5) + alpha kappa |v_u - SG(target)|^2.

    The kappa term is not in the paper. Eq. 6 alone pulls the pruned path to a target that shares its weights, which
    runs away at alpha = 1; with a fixed target it damages the full path, which is Stage III's strong teacher.
    """
    return alpha * kappa * mse(v_u, v_target.detach()) + (1 - alpha) * mse(v_u, v_star)


def mse(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)  # a bfloat16 network's outputs are compared in float32
    return (a.to(wide) - b.to(wide)).square().mean()


class Prune:
    number = 2
    loss_key, drifts = "loss", False

    def __init__(
        self,
        cfg,
        net: VideoDiT,
        pruned: Sequence[int],
        batches: Callable[[int], Batch],
        held_out: Callable[[], Batch],
        card: dict,
        target: VideoDiT | None = None,
    ):
        self.cfg, self.net, self.batches, self.held_out, self.card, self.iters = (
            cfg,
            net,
            batches,
            held_out,
            card,
            cfg.iters,
        )
        self.pruned = list(pruned)
        self.keep = [i for i in range(net.num_blocks) if i not in self.pruned]
        # The fixed target: a copy of the teacher that never moves, or that follows as an average.
        self.target = (target or copy.deepcopy(net)).requires_grad_(False) if cfg.target != "self" else None
        self.frozen = [] if self.target is None else [self.target]
        self.kappa = 0.0 if cfg.target == "self" else cfg.kappa_unpruned
        self.grad_u = self.kappa * cfg.alpha > 0 or cfg.alpha < 1  # does any term train the full path?
        if cfg.drop == "joint" and cfg.alpha == 1 and self.kappa == 0:
            # These blocks then get no gradient; a sharded optimizer would still decay their weights.
            for i in self.pruned:
                net.blocks[i].requires_grad_(False)
        carried = self.target if cfg.target == "ema" else None
        optimizer = (cfg.lr, cfg.betas, cfg.weight_decay, cfg.clip, cfg.warmup, cfg.lr_schedule == "cosine")
        self.roles = {"student": Role(net, *optimizer, carried=carried)}
        self.start_error = 0.0

    def begin(self) -> None:
        self.start_error = self.error()

    def updates(self, step: int) -> list[Update]:
        # alpha = 1 with a self target: Eq. 6 is zero on the full path, so a coin that picks it leaves nothing to do.
        idle = not self.grad_u and not self.skips(step)
        return [] if idle else [Update("student", lambda: self.loss(step))]

    def skips(self, step: int) -> bool:
        """Does this step train the pruned path? Always, or by a coin that falls alike on every rank."""
        coin = torch.rand((), generator=generator(self.cfg.seed, 3, step)).item()
        return self.cfg.estimator == "full" or coin < self.cfg.p

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 7, with both paths (`full`) or with the one that a coin picks (`sampled`), from one walk."""
        cfg, batch = self.cfg, self.batches(step)
        x_t, t, noise, cond = noised(batch, cfg, cfg.seed, 2, step)
        v_star = flow.velocity(batch.x0, noise)
        keep = self.keep
        if cfg.drop == "independent":
            gen = generator(cfg.seed, 3, step)
            keep = draw_keep(self.pruned, self.net.num_blocks, cfg.p, cfg.full_drop_prob, gen)

        # One walk: both paths share everything before the first skipped block.
        skip = self.skips(step)
        trains_u = self.grad_u and (cfg.estimator == "full" or not skip)
        needs_u = trains_u or self.target is None
        streams = [Stream(cond, keep, grad=True)] * skip + [Stream(cond, None, grad=trains_u)] * needs_u
        out = self.net.walk(x_t, t, streams)
        v_u = out[-1] if needs_u else None
        with torch.no_grad():
            v_target = v_u if self.target is None else self.target(x_t, t, cond)

        record: dict[str, float] = {}
        loss = torch.zeros((), device=x_t.device)
        if skip:
            weight = 1.0 if cfg.estimator == "full" else 1 / cfg.p
            loss = loss + weight * pruned_terms(out[0], v_target, v_star, cfg.alpha)
            record["distill_pruned"] = mse(out[0].detach(), v_target).item()
        if trains_u:
            weight = 1.0 if cfg.estimator == "full" else 1 / (1 - cfg.p)
            loss = loss + weight * unpruned_terms(v_u, v_target, v_star, cfg.alpha, self.kappa)
            record["distill_unpruned"] = mse(v_u.detach(), v_target).item()
        return loss, record

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Move the averaged target, and stop a run whose full path has left its teacher (the self target can)."""
        cfg = self.cfg
        if cfg.target == "ema":
            follow(self.target, self.net, 1 - cfg.target_decay)
        if step % cfg.guard_every == 0 and not (error := self.error()) <= cfg.guard * self.start_error:
            raise ValueError(
                f"step {step}: the x0 error of the full path is {error:.4g}, {error / self.start_error:.2f} times its "
                f"start (guard={cfg.guard}); the run has diverged: use target=frozen, a lower lr, or alpha below 1"
            )

    @torch.no_grad()
    def error(self, keep: Sequence[int] | None = None) -> float:
        """Stage I's measure (Eq. 4) on held-out clips, as many at a time as in training; the ranks share the clips."""
        net, batch = self.net, self.held_out()
        count = len(batch.x0)
        times = flow.shift_time(torch.linspace(0.02, 0.98, count), self.cfg.shift)
        noise = normal_like(batch.x0, generator(self.cfg.seed, 4))
        table = torch.zeros(count)
        turns = ranks.turns(count, self.cfg.sequence_parallel)
        size = self.cfg.micro_batch or max(1, self.cfg.batch // ranks.shares(self.cfg.sequence_parallel)[1])
        for start in range(0, len(turns), size):
            now = turns[start : start + size]
            some = torch.tensor([index for index, _ in now])
            x0, t, drawn = (x[some.to(x.device)].to(net.device) for x in (batch.x0, times, noise))
            x_t = flow.add_noise(x0, drawn, t)
            cond = batch.cond.map(lambda x, some=some: x[some.to(x.device)].to(net.device))
            errors = x0_error(net(x_t, t, cond, keep), x_t, t, x0)
            for (index, reports), error in zip(now, errors.tolist(), strict=True):
                if reports:
                    table[index] = error
        return ranks.summed(table).mean().item()

    def sampler(self) -> dict:
        return {"model": self.net, "keep": self.keep} | preview_plan(self.card, self.cfg.shift, self.net.released)

    def save(self, folder: Path, write: Callable = save_model) -> None:
        write(self.net, folder, **self.card | {"stage": 2, "pruned_path": self.keep, "shift": self.cfg.shift})
