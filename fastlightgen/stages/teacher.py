"""Stage 0: train or adapt a teacher by flow matching.

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B].
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.data.source import Batch
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.weights import save_model
from fastlightgen.models.sample import preview_plan
from fastlightgen.rng import generator, normal_like, rand


def flow_matching_loss(v: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean over elements of |v - (noise - x0)|^2 (Eq. 5 with the sign of Eq. 4)."""
    return (v - flow.velocity(x0, noise)).square().mean()


def noised(batch: Batch, cfg, *keys: int):
    """The draw shared by stages 0 and 2: (x_t, t, noise, cond), with the text dropped for some clips."""
    gen = generator(*keys)
    size = batch.x0.shape[0]
    t = flow.draw_times(size, cfg.shift, cfg.time, gen).to(batch.x0.device)
    cond = batch.drop_text(rand(size, gen) < cfg.text_dropout)
    noise = normal_like(batch.x0, gen)
    return flow.add_noise(batch.x0, noise, t), t, noise, cond


class Teacher:
    number = 0
    loss_key, drifts = "loss", False
    frozen: list[VideoDiT] = []

    def __init__(self, cfg, net: VideoDiT, batches: Callable[[int], Batch], card: dict):
        self.cfg, self.net, self.batches, self.card, self.iters = cfg, net, batches, card, cfg.iters
        self.roles = {
            "teacher": Role(
                net, cfg.lr, cfg.betas, cfg.weight_decay, cfg.clip, cfg.warmup, cfg.lr_schedule == "cosine", cfg.ema
            )
        }

    def begin(self) -> None:
        """Nothing to look at: the target is the data."""

    def updates(self, step: int) -> list[Update]:
        return [Update("teacher", lambda: self.loss(step))]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        batch = self.batches(step)
        x_t, t, noise, cond = noised(batch, self.cfg, self.cfg.seed, 0, step)
        return flow_matching_loss(self.net(x_t, t, cond), batch.x0, noise), {}

    def check(self, step: int) -> None:
        """Nothing can drift here: the target is the data."""

    def sampler(self) -> dict:
        return {"model": self.net} | preview_plan(self.card, self.cfg.shift, self.net.released)

    def save(self, folder: Path, write: Callable = save_model) -> None:
        card = {"stage": 0, "shift": self.cfg.shift, "source": self.cfg.data}
        write(self.net, folder, getattr(torch, self.cfg.save_dtype), **self.card | card)
