"""The kernel distance against hand-computed values, and without bias."""

import pytest
import torch

from fastlightgen.metrics.intervals import counts
from fastlightgen.metrics.kernel import kernel, kernel_distance, kernel_statistic


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_kernel_by_hand():
    x, y = torch.tensor([[1.0, 3.0]]).double(), torch.tensor([[2.0, -1.0], [0.0, 2.0]]).double()
    assert kernel(x, y).tolist() == [[(-1 / 2 + 1) ** 3, (6 / 2 + 1) ** 3]]


def test_distance_by_hand():
    # The reference -1, 1 has mean 0 and deviation sqrt(2), so y = -+ 1 / sqrt(2) in its units; k(y1, y2) = (1/2)^3.
    # Clips 0 and 2 become 0 and sqrt(2): k(x1, x2) = 1; k(x1, y) = 1, 1; k(x2, y) = 0, 8.
    y, x = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([[0.0], [2.0]]).double()
    assert kernel_distance(y, x) == pytest.approx(1 + 1 / 8 - 2 * 10 / 4)


def test_zero_on_average_for_one_distribution():
    for n in (8, 32):  # the Frechet distance of 8 clips with 8 features would be of the order of 8
        found = torch.tensor([kernel_distance(normal(100, 8, seed=k), normal(n, 8, seed=1000 + k)) for k in range(100)])
        print(f"n = {n}: mean {found.mean():.4f}, deviation {found.std():.4f}")
        # 0.01: the reference's own mean and deviation normalise both sets, which biases the distance by about 1 / 100
        assert found.mean().abs() < 3 * found.std() / 100**0.5 + 0.01
        assert (found < 0).float().mean() > 0.2  # an unbiased distance is often negative


def test_grows_with_a_shift():
    reference, x = normal(500, 8, seed=0), normal(200, 8, seed=1)
    found = [kernel_distance(reference, x + shift) for shift in (0, 0.2, 0.5, 1)]
    assert found == sorted(found) and abs(found[0]) < 0.03 < found[2]


def test_resamples_are_unbiased():
    """Copies of a clip in a resample are no pairs; a resample equals the distance of a set where each clip is once."""
    reference, x = normal(50, 3, seed=0), normal(6, 3, seed=1)
    statistic = kernel_statistic(reference, x)
    assert statistic(torch.tensor([[3, 1, 5]]))[0] == pytest.approx(kernel_distance(reference, x[[3, 1, 5]]))
    rows = torch.randint(6, (4000, 6), generator=torch.Generator().manual_seed(2))
    rows = rows[(counts(rows, 6) > 0).sum(1) > 1]
    found = statistic(rows)
    error = float(found.std()) / len(rows) ** 0.5
    slack = 4 * error + 0.05 * float(found.std())
    assert float(found.mean()) == pytest.approx(kernel_distance(reference, x), abs=slack)
