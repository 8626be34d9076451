"""Bootstrap intervals of scores and of paired differences: do two models differ beyond chance?

A statistic maps index sets [R,n] to R values: the score of each resampled set of clips. Two models that were sampled
for the same captions from the same noise are resampled together, so that what their clips have in common cancels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from fastlightgen.metrics.scores import BETTER, SAME, WORSE
from fastlightgen.rng import generator

Statistic = Callable[[Tensor], Tensor]
RESAMPLES = 200
MIN_CLIPS = 64  # below, the spread of the resamples is itself too uncertain
LEVEL = 0.95  # of all intervals
PURPOSE = 11  # of these random draws


@dataclass(frozen=True)
class Resampled:
    """A score of a set of clips, and of its resamples."""

    value: float
    values: Tensor  # float64 [RESAMPLES]
    clips: int
    seed: int


@dataclass(frozen=True)
class Difference:
    """How much a model's score exceeds another's, its interval, and the verdict on the model."""

    difference: float
    low: float
    high: float
    verdict: str


@lru_cache(8)
def draws(clips: int, seed: int) -> Tensor:
    """Index sets int64 [RESAMPLES, clips], drawn with replacement; set r depends on (seed, r, clips) only."""
    sets = [torch.randint(clips, (clips,), generator=generator(seed, PURPOSE, r)) for r in range(RESAMPLES)]
    return torch.stack(sets)


def counts(rows: Tensor, clips: int) -> Tensor:
    """How often each clip occurs in index sets [R,n]: float64 [R, clips]."""
    return torch.zeros(len(rows), clips, dtype=torch.float64).scatter_add_(1, rows, torch.ones_like(rows).double())


def mean_of(values: Tensor) -> Statistic:
    """The mean of one number per clip [n]; clips with nan do not count."""
    return lambda rows: values.double()[rows].nanmean(1)


def value(statistic: Statistic, clips: int) -> float:
    """The statistic of all clips."""
    return float(statistic(torch.arange(clips)[None]))


def resample(statistic: Statistic, clips: int, seed: int = 0) -> Resampled:
    """Evaluate a statistic on all clips and on the resamples (Efron 1979, Bootstrap methods, Ann. Stat. 7(1))."""
    if clips < MIN_CLIPS:
        raise ValueError(f"clips={clips}: too few to rank models; wanted at least {MIN_CLIPS}; raise clips=")
    return Resampled(value(statistic, clips), statistic(draws(clips, seed)).double(), clips, seed)


def resample_all(statistics: Mapping[str, tuple[Statistic, int]], seed: int) -> dict[str, Resampled]:
    """Resamples of each score, without scores that are not finite or have too few clips or captions to rank models."""
    found = {name: resample(statistic, n, seed) for name, (statistic, n) in statistics.items() if n >= MIN_CLIPS}
    return {name: f for name, f in found.items() if math.isfinite(f.value)}


def interval(found: Resampled) -> tuple[float, float]:
    """The normal 95% interval of a score: value +- 1.96 s, with the standard deviation s of the resamples.

    It is centred at the value. The resamples of a distance are larger than the distance itself, because a resample has
    fewer different clips; their percentiles would often exclude the value.
    """
    half = _width(found.values, 1)
    return found.value - half, found.value + half


def compare(
    model: Resampled, other: Resampled, goal: str, real: float = float("nan"), comparisons: int = 1
) -> Difference:
    """Compare two models that were measured on the same clips and noise; `goal` is one of metrics.scores.GOALS.

    The difference is model minus other. For the goals "one" and "real" it is the difference of the distances
    |score - 1| or |score - real|. With `comparisons` scores in a table, each interval has the level
    1 - 0.05 / comparisons (Bonferroni), so that 95% of the tables of equal models rank nothing.
    """
    if (model.clips, model.seed) != (other.clips, other.seed):
        pairs = f"{model.clips} clips of seed {model.seed}, {other.clips} clips of seed {other.seed}"
        raise ValueError(f"got {pairs}; wanted the same clips and seed for both models; measure them again")
    model, other = (to_goal(m, goal, real) for m in (model, other))
    half = _width(model.values - other.values, comparisons)
    difference = model.value - other.value
    low, high = difference - half, difference + half
    lower, higher = (WORSE, BETTER) if goal == "high" else (BETTER, WORSE)
    return Difference(difference, low, high, higher if low > 0 else lower if high < 0 else SAME)


def to_goal(found: Resampled, goal: str, real: float) -> Resampled:
    """The distance of a score to 1 or to that of real clips, for the goals "one" and "real"; else the score itself."""
    if goal not in ("one", "real"):
        return found
    target = 1.0 if goal == "one" else real
    return Resampled(abs(found.value - target), (found.values - target).abs(), found.clips, found.seed)


def _width(values: Tensor, comparisons: int) -> float:
    """Half the width of a normal interval."""
    return NormalDist().inv_cdf(1 - (1 - LEVEL) / (2 * comparisons)) * float(values.std())
