"""Differences of two models over several training seeds, measured on the same clips from the same noise."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastlightgen.metrics.intervals import Resampled, to_goal
from fastlightgen.metrics.scores import BETTER, SAME, SCORES, WORSE

Scores = Mapping[str, Resampled]


def gap(score: Resampled, key: str, real: Mapping[str, float]) -> Tensor:
    """The distance of a score and of its resamples [1 + R] to its goal; smaller is better. `real`: of real clips."""
    goal = SCORES[key][2]
    found = to_goal(score, goal, real[key] if goal == "real" else float("nan"))
    values = torch.cat([torch.tensor([found.value]).double(), found.values])
    return -values if goal == "high" else values


def over_seeds(pairs: Sequence[tuple[Scores, Scores]], keys: Sequence[str], real: Mapping[str, float]) -> dict:
    """Compare two models; a pair of scores per training seed. Return {score: difference, two_deviations, verdict}.

    The variance is that between training seeds, divided by their number, plus that between sets of clips, which all
    seeds share. A difference counts if it exceeds two standard deviations.
    """
    out = {}
    for key in keys:
        if not all(key in a and key in b for a, b in pairs):
            continue
        away = torch.stack([gap(a[key], key, real) - gap(b[key], key, real) for a, b in pairs])  # [seeds, 1 + R]
        between = away[:, 0].var().item() / len(pairs) if len(pairs) > 1 else 0.0
        two = 2 * (between + away.mean(0)[1:].var().item()) ** 0.5
        mean = away[:, 0].mean().item()
        verdict = SAME if abs(mean) <= two else WORSE if mean > 0 else BETTER
        out[key] = {"difference": mean, "two_deviations": two, "verdict": verdict}
    return out
