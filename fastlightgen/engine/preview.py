"""Clips made during training, in RUN/stageN/samples/: always the same held-out prompts from the same noise."""

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

CLIPS = 4  # clips per preview
PURPOSE = 9  # the key of their random draws; no stage uses it
REAL = 2 * CLIPS  # real clips to compare with: enough to estimate their spread


class World(Protocol):
    """Decodes latents to frames."""

    fps: int

    def frames(self, latents: Tensor) -> NDArray: ...


def turns(sequence: int) -> list[tuple[int, bool]]:
    """Return the indices of the clips that this rank makes, each with True if this rank decodes and reports it."""
    return ranks.turns(CLIPS, sequence)


class Preview:
    """Writes samples/step-000200.gif. It draws from its own generators, so that training is the same without it.

    The ranks divide the clips among them; rank 0 collects and writes them.
    """

    def __init__(self, source: Source, world: World | None, seed: int, device: torch.device, sequence: int = 1):
        """`world` may be None on ranks that decode nothing. `sequence`: number of ranks that share a clip's tokens."""
        self.source, self.world, self.seed, self.device, self.sequence = source, world, seed, device, sequence
        self.looks: list[dict] = []  # of the real clips, computed once

    def write(self, folder: Path, step: int, how: dict, stopped: Callable[[], bool]) -> list[dict] | None:
        """Make the clips with `how`, the arguments of `sample`, and write them; return the look of each on rank 0.

        The clips are made one by one. Before each one `stopped` is asked for a signal; after a signal return None.
        """
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
        """Return the look of REAL real clips, first those of the same prompts; decoded once, one at a time."""
        if not self.looks:
            clips = (self.source.held_out(i, 1).x0.to(self.device) for i in range(REAL))
            self.looks = [look(self._frames(x0)) for x0 in clips]
        return self.looks

    def _frames(self, latents: Tensor) -> NDArray[np.uint8]:
        """Decode a batch of one clip to frames [F, H, W, 3]."""
        assert self.world is not None  # only reporting ranks call this
        return self.world.frames(latents)[0]
