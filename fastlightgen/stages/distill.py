"""Stage III: distribution matching under a well-guided teacher (Eq. 8 and 9): a pruned student with a short ladder.

Shapes: x0, x_hat, x_t, v [B, C, F, H, W]; t, beta [B].
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import Cond, Stream, VideoDiT
from fastlightgen.models.folder.weights import save_model
from fastlightgen.models.lora import lora_on
from fastlightgen.models.streams import TextKeys
from fastlightgen.ops import dmd_gradient
from fastlightgen.rng import generator, normal_like, rand
from fastlightgen.stages.teacher import flow_matching_loss

STUDENT, FAKE = 5, 6  # the purposes of a step's random draws


def dmd_loss(x_hat: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient in x_hat is `gradient` / numel (Eq. 8, descended)."""
    return 0.5 * (x_hat - (x_hat - gradient).detach()).square().mean()


def uniform(size: int, low: float, high: float, gen: torch.Generator) -> Tensor:
    return low + (high - low) * rand(size, gen)


def score_times(size: int, shift: float, clamp: Sequence[float], gen: torch.Generator) -> Tensor:
    """t ~ U(0, 1), shifted, clamped: where the two scores are compared."""
    return flow.draw_times(size, shift, "uniform", gen).clamp(*clamp)


@dataclass
class Networks:
    """The four predictions of Stage III. `fake_net` may be `teacher` itself with LoRA adapters switched on."""

    student: VideoDiT  # G, pruned
    teacher: VideoDiT  # the Stage II network, frozen: weak with `keep`, strong with all blocks
    keep: list[int]
    fake_net: VideoDiT
    fake_keep: list[int] | None
    fake_trained: nn.Module  # what the critic's optimizer holds
    lora: bool
    original: VideoDiT | None  # the strong teacher where it is not the Stage II network
    null_keys: TextKeys = field(default_factory=dict)  # the frozen teacher's keys and values of the null prompt

    def fake(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with lora_on(self.fake_net) if self.lora else nullcontext():
            return self.fake_net(x_t, t, cond, self.fake_keep)

    @torch.no_grad()
    def real(self, x_t: Tensor, t: Tensor, batch: Batch) -> list[Tensor]:
        """v_p(c), v_p(null), v_u(c): one walk of the Stage II weights."""
        streams = [Stream(batch.cond, self.keep), Stream(batch.null, self.keep, text_keys=self.null_keys)]
        if self.original is None:
            return self.teacher.walk(x_t, t, [*streams, Stream(batch.cond)])
        return [*self.teacher.walk(x_t, t, streams), self.original(x_t, t, batch.cond)]


class Distill:
    number = 3
    loss_key, drifts = "fake_loss", True

    def __init__(self, cfg, nets: Networks, batches: Callable[[int], Batch], card: dict):
        self.cfg, self.nets, self.batches, self.card, self.iters = cfg, nets, batches, card, cfg.iters
        self.times = flow.ladder(cfg.steps, cfg.shift)
        common = (cfg.betas, cfg.weight_decay, cfg.clip, cfg.warmup, cfg.lr_schedule == "cosine")
        self.roles = {
            "student": Role(nets.student, cfg.lr, *common, ema=cfg.ema, ema_start=cfg.ema_start),
            "fake": Role(nets.fake_trained, cfg.lr_fake, *common, host=nets.teacher if nets.lora else None),
        }
        self.frozen = [net for net in ((None if nets.lora else nets.teacher), nets.original) if net is not None]

    def begin(self) -> None:
        """Nothing to look at beyond the loop's own checks."""

    def updates(self, step: int) -> list[Update]:
        """`outer` (DMD2): the critic at every step, the student at every ratio-th; `generator`: the student at every
        step, followed by ratio critic updates."""
        ratio = self.cfg.ratio
        critics = 1 if self.cfg.count == "outer" else ratio
        updates = [Update("fake", lambda c=c: self.critic_loss(step * critics + c)) for c in range(critics)]
        if self.cfg.count == "generator" or step % ratio == 0:
            updates.insert(0, Update("student", lambda: self.student_loss(step)))
        return updates

    def rollout(self, batch: Batch, gen: torch.Generator) -> tuple[Tensor, int]:
        """Backward simulation with early exit: from noise down to a random rung, or from noised data at that rung.

        Returns the clips and the rung, counted from 0."""
        exit_rung = int(torch.randint(len(self.times), (), generator=gen))  # one for the batch, alike on every rank
        noise = normal_like(batch.x0, gen)
        if self.cfg.rollout == "data":
            times = self.times[exit_rung : exit_rung + 1]
            x = flow.add_noise(batch.x0, noise, times[0])
        else:
            times, x = self.times[: exit_rung + 1], noise
        x_hat = flow.rollout(
            lambda x, t: self.nets.student(x, t, batch.cond), x, times, self.cfg.sampler, lambda _: normal_like(x, gen)
        )
        return x_hat, exit_rung

    def student_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Eq. 8: no gradient flows through x_t into the two scores."""
        cfg, batch = self.cfg, self.batches(step)
        gen, size = generator(cfg.seed, STUDENT, step), len(batch.x0)
        x_hat, rung = self.rollout(batch, gen)
        with torch.no_grad():
            x0 = x_hat.detach()
            t = score_times(size, cfg.score_shift or cfg.shift, cfg.t_clamp, gen).to(x0.device)
            x_t = flow.add_noise(x0, normal_like(x0, gen), t)
            beta1 = uniform(size, cfg.beta1 - cfg.a1, cfg.beta1 + cfg.b1, gen).to(x0.device)
            beta2 = uniform(size, cfg.beta2 - cfg.a2, cfg.beta2 + cfg.b2, gen).to(x0.device)
            v_fake = self.nets.fake(x_t, t, batch.cond)
            v_pc, v_pn, v_uc = self.nets.real(x_t, t, batch)
            gradient, normaliser = dmd_gradient(x0, x_t, t, v_fake, v_pc, v_pn, v_uc, beta1, beta2)
            if cfg.normaliser == "none":
                gradient = gradient * flow.per_sample(normaliser, gradient)
        gap = normaliser.mean().item()  # mean |x - x0_real|
        return dmd_loss(x_hat, gradient), {
            "x0_gap": gap,
            f"x0_gap_rung{rung + 1}": gap,  # of the step's own exit only: the rungs are curves of their own
            "contrast": x0.flatten(1).std(1).mean().item(),  # of a clip; grows when a student over-saturates
            "contrast_data": batch.x0.flatten(1).std(1).mean().item(),
        }

    def critic_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Flow matching of the fake network on the student's own clips, without guidance."""
        cfg, batch = self.cfg, self.batches(step)
        gen = generator(cfg.seed, FAKE, step)
        with torch.no_grad():
            x_hat, _ = self.rollout(batch, gen)
        t = score_times(len(x_hat), cfg.score_shift or cfg.shift, cfg.t_clamp, gen).to(x_hat.device)
        noise = normal_like(x_hat, gen)
        return flow_matching_loss(self.nets.fake(flow.add_noise(x_hat, noise, t), t, batch.cond), x_hat, noise), {}

    def check(self, step: int) -> None:
        """Nothing to stop for beyond the loop's own checks."""

    def sampler(self) -> dict:
        return {"model": self.nets.student, "times": self.times, "guidance": 1.0, "kind": self.cfg.sampler}

    def save(self, folder: Path, write: Callable = save_model) -> None:
        cfg = self.cfg
        card = {"stage": 3, "ladder": self.times, "shift": cfg.shift, "guidance": 1.0, "sampler": cfg.sampler}
        write(self.nets.student, folder, **self.card | card)
