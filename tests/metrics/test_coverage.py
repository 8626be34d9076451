"""Precision, recall, density and coverage on small sets."""

import pytest
import torch

from fastlightgen.metrics.coverage import Regions, density_coverage, precision_recall, radii


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_radii_by_hand():
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert radii(x, 1).tolist() == [1, 1, 2, 4] and radii(x, 2).tolist() == [3, 2, 3, 6]


def test_identical_and_disjoint_sets():
    x = normal(100, 4, seed=0)
    assert precision_recall(x, x) == (1.0, 1.0) and density_coverage(x, x)[1] == 1.0
    assert precision_recall(x, x + 100) == (0.0, 0.0) and density_coverage(x, x + 100) == (0.0, 0.0)


def test_two_sets_of_one_distribution():
    """A ball of k neighbours holds none of as many new points with a chance of about 1 / 2^k (Naeem et al.)."""
    x, y = normal(500, 4, seed=0), normal(500, 4, seed=1)
    density, coverage = density_coverage(x, y)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.02) and density == pytest.approx(1, abs=0.1)
    precision, recall = precision_recall(x, y)
    assert precision > 0.8 and recall > 0.8 and abs(precision - recall) < 0.1


def test_half_of_the_modes_and_outliers():
    """Half of the modes: full precision, half the recall. The reverse: half the precision, full recall."""
    modes = torch.tensor([0.0, 50.0])[torch.arange(400) % 2, None].double()
    both, one = normal(400, 3, seed=0) + modes, normal(400, 3, seed=1)
    precision, recall = precision_recall(both, one)
    assert precision > 0.85 and 0.35 < recall < 0.5
    assert density_coverage(both, one)[1] == pytest.approx(0.5, abs=0.03)
    precision, recall = precision_recall(one, both)
    assert 0.35 < precision < 0.5 and recall > 0.85


def test_resamples_keep_the_balls():
    reference = torch.tensor([[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]]).double()
    found = Regions(reference, reference)
    rows = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]])
    # the third neighbour of clip 0 is 11 away: its ball holds 0, 1, 10, 11
    assert found.recall()(rows).tolist() == pytest.approx([4 / 6, 1.0])
    assert found.precision()(rows).tolist() == [1.0, 1.0]
