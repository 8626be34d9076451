"""Precision and recall, density and coverage of a set of clips: which of two failures makes a distance large?

Around each clip of a set lies a ball that reaches its k-th nearest neighbour in the set. The balls together are the
region that the set occupies. Features [n,D] have the units of the Frechet distance.
"""

import torch
from torch import Tensor

from fastlightgen.metrics.frechet import Units, normalise
from fastlightgen.metrics.intervals import Statistic, counts, mean_of, value

RECALL_NEIGHBOURS, COVERAGE_NEIGHBOURS = 3, 5  # the values of the two papers


def radii(x: Tensor, neighbours: int) -> Tensor:
    """Distance of each of x [n,D] to its k-th nearest neighbour: [n]."""
    assert len(x) > neighbours, (len(x), neighbours)
    distance = _distances(x, x)
    return distance.fill_diagonal_(float("inf")).kthvalue(neighbours, dim=1).values


class Regions:
    """The four measures of clips `feats` [n,D] against the first n reference clips.

    Equal numbers, because the balls shrink as a set grows. Resamples keep the balls of the full set.
    """

    def __init__(self, reference: Tensor, feats: Tensor, units: Units = normalise) -> None:
        y, x = units(reference, reference[: len(feats)]), units(reference, feats)
        self.clips, distance = len(x), _distances(x, y)  # [clip, reference clip]
        self.near = distance <= radii(y, RECALL_NEIGHBOURS)  # the clip lies in the reference clip's ball
        self.holds = distance <= radii(x, RECALL_NEIGHBOURS)[:, None]  # the reverse
        self.wide = distance <= radii(y, COVERAGE_NEIGHBOURS)

    # Kynkaanniemi et al. 2019, Improved precision and recall metric (arXiv 1904.06991), equations 1 and 2:
    #   precision = share of clips inside a ball of a reference clip;  recall = the reverse
    def precision(self) -> Statistic:
        """Share of the clips that look like some real clip."""
        return mean_of(self.near.any(1).double())

    def recall(self) -> Statistic:
        """Share of the real clips that look like some clip."""
        return self._reached(self.holds)

    # Naeem et al. 2020, Reliable fidelity and diversity metrics (arXiv 2002.09797), equations 3 and 4:
    #   density = number of balls of reference clips that hold a clip / k, mean over the clips
    #   coverage = share of balls of reference clips that hold at least one clip
    def density(self) -> Statistic:
        """How crowded with real clips the places of the clips are; about 1 for real clips."""
        return mean_of(self.wide.double().sum(1) / COVERAGE_NEIGHBOURS)

    def coverage(self) -> Statistic:
        """Share of the real clips with a clip among their neighbours; 0.97 for real clips."""
        return self._reached(self.wide)

    def _reached(self, pairs: Tensor) -> Statistic:
        """Share of the reference clips that at least one resampled clip is paired with."""
        return lambda rows: (counts(rows, self.clips) @ pairs.double() > 0).double().mean(1)


def precision_recall(reference: Tensor, feats: Tensor) -> tuple[float, float]:
    found = Regions(reference, feats)
    return value(found.precision(), found.clips), value(found.recall(), found.clips)


def density_coverage(reference: Tensor, feats: Tensor) -> tuple[float, float]:
    found = Regions(reference, feats)
    return value(found.density(), found.clips), value(found.coverage(), found.clips)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [n,m]; exactly 0 between equal clips, which the usual expansion of the square is not."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
