"""Diversity within a caption: how much do clips of one caption differ in what the caption leaves open?

The reader measures where the main shape starts, when it turns, and where the companion is in the last frames.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.metrics.intervals import Statistic, value
from fastlightgen.world import reader
from fastlightgen.world.captions import CHANGES, parse
from fastlightgen.world.chance import uniforms
from fastlightgen.world.shapes import Clips, Shapes

REDRAWS = 16  # real clips per caption, which show the true spread
TRUE_START, OTHER_START = 2_000_000, 3_000_000  # of the indices of new clips: for the true spread, and for others
MEASURES = ("start", "turn frame", "companion")
_LAST = 4  # frames: every companion is in the picture by then
_STATED = [1, 2, 3, 4, 5, 11, 12, 13]  # random numbers of a clip that decide its caption


class Redraws(Shapes):
    """New clips for the captions of the clips `asked` of a world: all that a caption leaves open is drawn anew."""

    def __init__(self, world: Shapes, asked: Sequence[int]) -> None:
        super().__init__(world.frames, world.size, world.seed, first_frame_prob=0.0, split=world.split)
        slots = max(_STATED) + 1
        self.stated = uniforms(world.seed, world.split, asked, slots)[:, _STATED]

    def _truth(self, u: NDArray) -> dict[str, NDArray]:
        stated = u.copy()
        stated[:, _STATED] = self.stated
        return super()._truth(stated)


def redraw(world: Shapes, captions: int, draws: int, start: int = OTHER_START) -> Clips:
    """`draws` new clips for each of the first `captions` captions; the clips of a caption follow each other."""
    asked = np.repeat(np.arange(captions), draws)
    clips = Redraws(world, asked.tolist()).batch(range(start, start + len(asked)))
    wanted = world.batch(range(captions)).captions
    assert clips.captions == [wanted[i] for i in asked], "_STATED must list the random numbers that decide a caption"
    return clips


def spreads(video: Tensor, captions: Sequence[str], draws: int) -> Tensor:
    """Unbiased variance within each caption of each of MEASURES: [captions, 3], nan where it cannot be measured.

    `video` [captions * draws, F,3,H,W] holds the clips of a caption one after the other. A measure of several numbers
    counts the sum of their variances. Clips without the shape do not count.
    """
    assert draws > 1 and len(video) == len(captions) and len(video) % draws == 0, (len(video), len(captions), draws)
    reading, rows = reader.read(video), np.arange(len(video))
    stated = [parse(text) for text in captions]
    colour = np.array([s.colour for s in stated])
    other = np.array([s.other[0] if s.other else -1 for s in stated])
    turns = np.array([s.change != CHANGES.index("on") for s in stated])
    turn = reading.turn_frame[rows, colour, [s.direction for s in stated], [s.speed for s in stated],
                              [s.change for s in stated]]  # fmt: skip
    seen = reading.present[rows, colour]
    measured = {
        "start": (reading.path[rows, 0, colour], seen),
        "turn frame": (turn[:, None].astype(float), seen & turns),
        "companion": (reading.path[rows, -_LAST:, other].reshape(len(rows), -1),
                      (other >= 0) & reading.present[rows, other]),
    }  # fmt: skip
    found = [_variance(torch.from_numpy(np.where(ok[:, None], x, np.nan)), draws) for x, ok in measured.values()]
    return torch.stack(found, 1)


def _variance(x: Tensor, draws: int) -> Tensor:
    """Sum over the K numbers of the variance within each group of `draws` rows of x [groups * draws, K]: [groups]."""
    x = x.view(-1, draws, x.shape[1])
    count = (~x[..., 0].isnan()).sum(1)
    square = (x - x.nanmean(1, keepdim=True)).square().nansum((1, 2))
    return torch.where(count > 1, square / (count - 1), torch.nan)


def diversity_statistic(spread: Tensor, true: Tensor) -> Statistic:
    """Diversity of resampled captions, from the spreads [captions, 3] of a model and of the world.

    diversity = mean over the measures of sqrt(mean variance of the model / mean variance of the world), means over the
    captions. 1: as diverse as the data; 0: always the same clip.
    """
    return lambda rows: (spread[rows].nanmean(1) / true[rows].nanmean(1)).sqrt().nanmean(1)


def true_spreads(world: Shapes, captions: int) -> Tensor:
    """The spreads [captions, 3] of real clips for the first captions of a world."""
    clips = redraw(world, captions, REDRAWS, TRUE_START)
    return spreads(clips.video, clips.captions, REDRAWS)


def diversity(spread: Tensor, true: Tensor) -> float:
    return value(diversity_statistic(spread, true), len(spread))
