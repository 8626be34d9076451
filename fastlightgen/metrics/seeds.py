"""Differences of two models over several training seeds, measured on the same clips from the same noise."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlightgen.metrics.intervals import Resampled, to_goal
from fastlightgen.metrics.scores import BETTER, SAME, WORSE

Scores = Mapping[str, Resampled]


def joined(score: Resampled) -> Tensor:
    """A score and its resamples, float64 [1 + R]."""
    return torch.cat([torch.tensor([score.value]).double(), score.values])


def gap(score: Resampled, goal: str, real: float) -> Tensor:
    """The distance of a score and of its resamples [1 + R] to its goal; smaller is better. `real`: of real clips."""
    values = joined(to_goal(score, goal, real))
    return -values if goal == "high" else values


def two_deviations(values: Tensor) -> float:
    """Two standard deviations of the mean over training seeds. values [seeds, 1 + R]: as measured, then as resampled.

    The variance is that between training seeds, divided by their number, plus that between sets of clips, which all
    seeds share. With few seeds this is no 95% interval: where the seeds' part is the larger one, the mean of three
    lies within two deviations in 82% of all cases, that of five in 88% (Student's t).
    """
    between = values[:, 0].var().item() / len(values) if len(values) > 1 else 0.0
    return 2 * (between + values.mean(0)[1:].var().item()) ** 0.5


def spread(scores: Sequence[Scores], key: str) -> float:
    """Two standard deviations of the mean of a score, over training seeds and sets of clips."""
    return two_deviations(torch.stack([joined(score[key]) for score in scores]))


def over_seeds(
    pairs: Sequence[tuple[Scores, Scores]], goals: Mapping[str, str], real: Mapping[str, float]
) -> dict[str, dict]:
    """Compare two models; a pair of scores per training seed. Return {score: difference, two_deviations, verdict}.

    `goals`: of the scores to compare, as in metrics.scores; `real`: scores of real clips, for the goal "real". A
    difference counts if it exceeds two standard deviations.
    """
    out = {}
    for key, goal in goals.items():
        if not all(key in a and key in b for a, b in pairs):
            continue
        target = real[key] if goal == "real" else math.nan
        away = torch.stack([gap(a[key], goal, target) - gap(b[key], goal, target) for a, b in pairs])  # [seeds, 1 + R]
        two, mean = two_deviations(away), away[:, 0].mean().item()
        verdict = SAME if abs(mean) <= two else WORSE if mean > 0 else BETTER
        out[key] = {"difference": mean, "two_deviations": two, "verdict": verdict}
    return out
