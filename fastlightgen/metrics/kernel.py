"""The kernel distance (KID) between sets of clips: like the Frechet distance, but unbiased at any number of clips."""

import torch
from torch import Tensor

from fastlightgen.metrics.frechet import Units, normalise
from fastlightgen.metrics.intervals import Statistic, counts, value


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """The polynomial kernel k(x, y) = (x . y / D + 1)^3 of feature sets [N,D] and [M,D]: [N,M]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


# Binkowski et al. 2018, Demystifying MMD GANs (arXiv 1801.01401), section 3; N reference clips y and n clips x:
#   KID = sum_{i != j} k(x_i, x_j) / (n (n-1)) + sum_{i != j} k(y_i, y_j) / (N (N-1)) - 2 mean_{i, j} k(x_i, y_j)
def kernel_statistic(reference: Tensor, feats: Tensor, units: Units = normalise) -> Statistic:
    """The kernel distance of resampled features [n,D] to reference features [N,D].

    Pairs of a clip with its own copy in a resample do not count, so that a resample is unbiased too.
    """
    y, x = units(reference, reference), units(reference, feats)
    own, cross = kernel(x, x).fill_diagonal_(0), kernel(x, y).mean(1)
    real = _pairs(kernel(y, y).fill_diagonal_(0), torch.ones(1, len(y), dtype=y.dtype))

    def statistic(rows: Tensor) -> Tensor:
        weight = counts(rows, len(x))
        return _pairs(own, weight) + real - 2 * weight @ cross / rows.shape[1]

    return statistic


def _pairs(values: Tensor, weight: Tensor) -> Tensor:
    """The mean of values [n,n] with a zero diagonal over pairs of different clips, weighted by weight [R,n]: [R]."""
    total = (weight @ values * weight).sum(1)
    return total / (weight.sum(1) ** 2 - (weight**2).sum(1))


def kernel_distance(reference: Tensor, feats: Tensor) -> float:
    """The unbiased kernel distance of feature sets [N,D] and [n,D]; 0 on average for two sets of one distribution."""
    return value(kernel_statistic(reference, feats), len(feats))
