"""Clips made while a stage trains, always of the same held-out prompts from the same noise: RUN/stageN/samples/."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.data.frames import write_clips
from fastlightgen.data.source import Source
from fastlightgen.metrics.drift import look
from fastlightgen.models.sample import sample
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.rng import generator, normal_like

CLIPS, PURPOSE = 4, 9  # how many; the purpose of their random draws, apart from those of the stages
REAL = 2 * CLIPS  # real clips to compare with; their spread counts too


class World(Protocol):
    """What turns latents into frames."""

    fps: int

    def frames(self, latents: Tensor) -> NDArray: ...


def turns(sequence: int) -> list[tuple[int, bool]]:
    """The clips that this rank makes, and which of them it shows."""
    return ranks.turns(CLIPS, sequence)


class Preview:
    """Writes step-000200.gif when the loop asks for it. It draws from its own generators: training does not notice.

    The ranks share the clips; rank 0 gets and writes them.
    """

    def __init__(self, source: Source, world: World | None, seed: int, device: torch.device, sequence: int = 1):
        """`world` shows latents; None on ranks that have none to show. `sequence`: ranks that share a clip's tokens."""
        self.source, self.world, self.seed, self.device, self.sequence = source, world, seed, device, sequence
        self.looks: list[dict] = []  # of real clips

    def write(self, folder: Path, step: int, how: dict, stopped: Callable[[], bool]) -> list[dict] | None:
        """`how`: the network and its plan, arguments of `sample`. One clip at a time, so that a signal is heard.

        Returns the look of every clip, on rank 0, and None after a signal."""
        own: dict[int, NDArray[np.uint8]] = {}
        for i, reports in turns(self.sequence):
            if stopped():
                return None
            batch = self.source.held_out(i, 1).to(self.device)
            noise = normal_like(batch.x0, generator(self.seed, PURPOSE, i))
            latents = sample(cond=batch.cond, null=batch.null, noise=noise, seed=self.seed, **how)
            if reports:
                own[i] = self._frames(latents)
        found = [ranks.to_first(torch.from_numpy(own[i]) if i in own else None) for i in range(CLIPS)]
        if ranks.rank():
            return []
        clips = [clip.numpy() for clip in found if clip is not None]  # rank 0 has all of them
        assert self.world is not None
        try:
            # A cache may hold several sizes; the file shows the clips that have the size of the first one.
            same = np.stack([clip for clip in clips if clip.shape == clips[0].shape])
            write_clips(folder / f"step-{step:06d}.gif", same, self.world.fps)
        except OSError as err:
            say(f"step {step}: no clips written to {folder} ({err}); training goes on")
        return [look(clip) for clip in clips]

    def real(self) -> list[dict]:
        """The look of the same prompts' real clips and of some more, decoded once, one at a time."""
        if not self.looks:
            clips = (self.source.held_out(i, 1).x0.to(self.device) for i in range(REAL))
            self.looks = [look(self._frames(x0)) for x0 in clips]
        return self.looks

    def _frames(self, latents: Tensor) -> NDArray[np.uint8]:
        """The frames [F, H, W, 3] of the only clip of a batch."""
        assert self.world is not None  # ranks that show nothing do not come here
        return self.world.frames(latents)[0]
