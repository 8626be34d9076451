"""How much clips are like real ones: naturalness, the score in which a clip is farthest from them, the distances."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fastlightgen.evaluation.collect import Footage
from fastlightgen.evaluation.sets import Statistics, distances, means, scores_of
from fastlightgen.metrics.footage import MEANING
from fastlightgen.metrics.frechet import normalise, raw
from fastlightgen.metrics.natural import Moments, distance

GROUPS = 64  # of real videos, whose contrasts are put together
NOTHING = Moments.of(torch.zeros(0, 36, dtype=torch.float64))
Farthest = tuple[float, str, float]  # deviations from the real clips, score, mean of the real clips


def complete(made: Footage, real: Footage) -> list[Farthest]:
    """Fill in what needs the real clips, naturalness and `unlike`; `real` itself must be completed first.

    Return, for each clip, the score in which it is farthest from the real clips.
    """
    made.values["naturalness"] = naturalness(made, real)
    found = farthest(numbers(made), numbers(real))
    made.values["unlike"] = [deviations for deviations, _, _ in found]
    return found


def numbers(footage: Footage) -> dict[str, Tensor]:
    """The scores of each clip [n], in the order of the table."""
    keys = [key for key in (*MEANING, "unlike") if key in footage.values]
    return {key: torch.tensor(footage.values[key], dtype=torch.float64) for key in keys}


def naturalness(made: Footage, real: Footage) -> list[float]:
    """The distance of each clip's contrasts to those of the real video that is nearest; of a real clip without itself.

    Many real videos form GROUPS of neighbours in the list.
    """
    count = max(real.video) + 1
    groups, own = [NOTHING] * min(count, GROUPS), [number * min(count, GROUPS) // count for number in real.video]
    for group, part in zip(own, real.contrasts, strict=True):
        groups[group] = groups[group] + part
    out = []
    for i, part in enumerate(made.contrasts):
        others = [g - part if made is real and own[i] == n else g for n, g in enumerate(groups)]
        away = [x for g in others if not math.isnan(x := distance(g, part))]
        out.append(min(away, default=math.nan))
    return out


def farthest(own: Mapping[str, Tensor], real: Mapping[str, Tensor]) -> list[Farthest]:
    """For each clip the score in which it is farthest from the real clips.

    A score that is better than theirs is not far. A deviation counts as at least 5 % of the mean, because real clips
    may be all alike.
    """
    usual = {score: x[x.isfinite()] for score, x in real.items() if score in MEANING}
    known = {score: (float(x.mean()), float(x.std())) for score, x in usual.items() if len(x) > 1}
    out = []
    for i in range(len(next(iter(own.values())))):
        rows = []
        for score, (mean, deviation) in known.items():
            away = float(own[score][i]) - mean
            away = max(away, 0.0) if MEANING[score][1] == "low" else abs(away)
            if math.isfinite(away):
                rows.append((away / max(deviation, 0.05 * abs(mean), 1e-6), score, mean))
        out.append(max(rows, default=(math.nan, "", math.nan)))
    return out


def statistics(made: Footage, real: Footage) -> Statistics:
    """All scores of the clips against the real ones."""
    found = means(numbers(made)) | distances(torch.stack(real.features), torch.stack(made.features), normalise)
    if real.network:
        found |= distances(torch.stack(real.network), torch.stack(made.network), raw, "network_")
    return found


def against_themselves(real: Footage) -> dict[str, float]:
    """The scores of the real clips: means, and the distances of every second clip to the others."""
    found = means(numbers(real))
    stacks = [("", real.features, normalise)] + ([("network_", real.network, raw)] if real.network else [])
    for prefix, parts, units in stacks:
        x = torch.stack(parts)
        found |= distances(x[::2], x[1::2], units, prefix)
    return scores_of(found)
