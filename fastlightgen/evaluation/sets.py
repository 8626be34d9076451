"""Scores of a set of clips against real ones: means of what was measured of each clip, and distances of the sets."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.config import UserError
from fastlightgen.files.tensors import read_tensors
from fastlightgen.metrics.coverage import COVERAGE_NEIGHBOURS, Regions
from fastlightgen.metrics.frechet import Units, frechet_statistic
from fastlightgen.metrics.intervals import (
    MIN_CLIPS,
    Resampled,
    Statistic,
    compare,
    interval,
    mean_of,
    resample,
    resample_all,
    value,
)
from fastlightgen.metrics.kernel import kernel_statistic

WIDEST = 512  # features; with more of them 200 resamples of a Frechet distance take minutes

Statistics = dict[str, tuple[Statistic, int]]  # score -> (statistic, number of clips that it resamples)


def read_values(file: Path, remedy: str) -> dict[str, Tensor]:
    """Read what was measured of each clip; a set of features is a table of finite numbers, as wide as its reference."""
    found = {k: v.double() for k, v in read_tensors(file).items()}
    tables = [k for k in found if k.endswith(("features", "energies"))]
    bad = [k for k in tables if found[k].ndim != 2 or not found[k].isfinite().all()]
    bad += [k for k in tables if (real := found.get(f"real_{k}")) is not None and real.shape[-1] != found[k].shape[-1]]
    if bad:
        raise UserError(f"{file}: {bad[0]} is no table of finite numbers as wide as that of real clips; {remedy}")
    return found


def means(values: Mapping[str, Tensor]) -> Statistics:
    """The means of numbers [n] per clip; clips with nan do not count."""
    return {name: (mean_of(x), len(x)) for name, x in values.items()}


def distances(real: Tensor, made: Tensor, units: Units, prefix: str = "") -> Statistics:
    """Distances and coverage of features [n,D] to those of real clips [N,D], for two clips or more of each."""
    n = len(made)
    if min(n, len(real)) < 2:
        return {}
    found: Statistics = {
        f"{prefix}frechet": (frechet_statistic(real, made, units), n),
        f"{prefix}kid": (kernel_statistic(real, made, units), n),
    }
    fewer = min(n, len(real))  # the regions of two sets are compared at equal numbers
    if fewer > COVERAGE_NEIGHBOURS:
        regions = Regions(real[every(len(real), fewer)], made[every(n, fewer)], units)
        found |= {
            f"{prefix}precision": (regions.precision(), fewer),
            f"{prefix}recall": (regions.recall(), fewer),
            f"{prefix}coverage": (regions.coverage(), fewer),
        }
    return found


def every(count: int, chosen: int) -> Tensor:
    """`chosen` of the numbers 0 ... count - 1, evenly spread, each once."""
    return torch.arange(chosen) * count // chosen


def scores_of(statistics: Statistics) -> dict[str, float]:
    return {name: value(statistic, n) for name, (statistic, n) in statistics.items()}


def intervals_of(statistics: Statistics, seed: int, features: int = 0) -> dict[str, tuple[float, float]]:
    """95% intervals of the scores with enough clips; `features`: the number D that a Frechet distance compares."""
    out = {}
    for name, (statistic, n) in statistics.items():
        if n >= MIN_CLIPS and not (name.endswith("frechet") and features > WIDEST):
            found = resample(statistic, n, seed)
            if math.isfinite(found.value):
                out[name] = interval(found)
    return out


def differences(model: Statistics, other: Statistics, goals: Mapping[str, str], seed: int) -> dict[str, dict]:
    """The difference of each score to another model on the same clips and noise, with its interval and the verdict.

    `goals`: of metrics.scores, for the scores to compare. Fewer than MIN_CLIPS clips are not compared.
    """
    own, theirs = (resample_all({k: v for k, v in found.items() if k in goals}, seed) for found in (model, other))
    return compared(own, theirs, goals)


def compared(model: Mapping[str, Resampled], other: Mapping[str, Resampled], goals: Mapping[str, str]) -> dict:
    """The differences of two models whose scores are resampled already."""
    shared = [name for name in goals if name in model and name in other]
    return {n: asdict(compare(model[n], other[n], goals[n], comparisons=len(shared))) for n in shared}
