"""Clips made while a stage trains, always of the same held-out prompts from the same noise: RUN/stageN/samples/."""

from collections.abc import Callable
from pathlib import Path

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.data.frames import write_clips
from fastlightgen.data.source import Source
from fastlightgen.engine import ranks
from fastlightgen.engine.log import say
from fastlightgen.metrics.drift import look
from fastlightgen.models.sample import sample
from fastlightgen.rng import generator, normal_like

CLIPS, PURPOSE = 4, 9  # how many; the purpose of their random draws, apart from those of the stages
REAL = 2 * CLIPS  # real clips to compare with; their spread counts too


class Preview:
    """Writes step-000200.gif when the loop asks for it. It draws from its own generators: training does not notice."""

    def __init__(self, source: Source, frames: Callable[[Tensor], NDArray], fps: int, seed: int, device: torch.device):
        self.source, self.frames, self.fps, self.seed, self.device = source, frames, fps, seed, device
        self.looks: list[dict] = []  # of real clips

    def write(self, folder: Path, step: int, how: dict, stopped: Callable[[], bool]) -> list[dict]:
        """`how`: the network and its plan, arguments of `sample`. One clip at a time, so that a signal is heard.

        Returns the look of every clip; nothing after a signal."""
        clips = []
        for i in range(CLIPS):
            if stopped():
                return []
            batch = self.source.held_out(i, 1).to(self.device)
            noise = normal_like(batch.x0, generator(self.seed, PURPOSE, i))
            clips.append(self.frames(sample(cond=batch.cond, null=batch.null, noise=noise, seed=self.seed, **how)))
        looks = [look(c[0]) for c in clips]
        if ranks.rank():
            return looks
        try:
            # a cache may hold several sizes; a file holds the clips of the first one's
            same = [c[0] for c in clips if c.shape == clips[0].shape]
            write_clips(folder / f"step-{step:06d}.gif", same, self.fps)
        except OSError as err:
            say(f"step {step}: no clips written to {folder} ({err}); training goes on")
        return looks

    def real(self) -> list[dict]:
        """The look of the same prompts' real clips and of some more, decoded once, one at a time."""
        if not self.looks:
            self.looks = [look(self.frames(self.source.held_out(i, 1).x0.to(self.device))[0]) for i in range(REAL)]
        return self.looks
