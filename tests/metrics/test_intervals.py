"""Paired bootstrap intervals on synthetic scores whose true difference is known."""

import pytest
import torch

from fastlightgen.metrics.intervals import (
    MIN_CLIPS,
    RESAMPLES,
    compare,
    counts,
    draws,
    interval,
    mean_of,
    resample,
    value,
)

N, REPEATS = 100, 200


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_resamples_depend_on_the_seed_alone():
    rows = draws(N, 3).clone()
    draws.cache_clear()
    assert torch.equal(draws(N, 3), rows) and not torch.equal(draws(N, 4), rows)
    assert rows.shape == (RESAMPLES, N) and rows.min() == 0 and rows.max() == N - 1
    assert torch.equal(counts(torch.tensor([[0, 2, 2]]), 4), torch.tensor([[1.0, 0, 2, 0]]).double())


def test_mean_by_hand():
    values = torch.tensor([1.0, float("nan"), 5.0])
    assert value(mean_of(values), 3) == 3.0
    assert mean_of(values)(torch.tensor([[0, 0, 2], [1, 2, 2]])).tolist() == pytest.approx([7 / 3, 5.0])
    # the bootstrap deviation of a mean is s / sqrt(n), with s from the sample (correction 0)
    x = normal(400)
    low, high = interval(resample(mean_of(x), 400))
    assert (low + high) / 2 == pytest.approx(float(x.mean()))
    assert (high - low) / 2 == pytest.approx(1.96 * float(x.std(correction=0)) / 20, rel=0.15)  # 200 resamples: 5%


def test_intervals_hold_the_true_difference():
    """Nominal level 95%; a share of 200 draws deviates from it by 1.5%."""
    common = normal(REPEATS, N, seed=1)
    a, b = common + 0.3 + 0.5 * normal(REPEATS, N, seed=2), common + 0.5 * normal(REPEATS, N, seed=3).abs()
    true = 0.3 - 0.5 * (2 / torch.pi) ** 0.5
    hits = 0
    for x, y in zip(a, b, strict=True):
        found = compare(resample(mean_of(x), N), resample(mean_of(y), N), "high")
        hits += found.low <= true <= found.high
    print(f"coverage {hits / REPEATS:.3f}")
    assert 0.90 <= hits / REPEATS <= 0.99


def test_equal_models_are_not_ranked():
    """One comparison ranks equal models in 5% of the cases; a table of 12 comparisons in 5% of the tables."""
    common = normal(REPEATS, N, seed=4)
    a, b = common + normal(REPEATS, N, seed=5), common + normal(REPEATS, N, seed=6)
    for comparisons, low, high in ((1, 0.01, 0.10), (12, 0.0, 0.02)):
        found = [
            compare(resample(mean_of(x), N), resample(mean_of(y), N), "low", comparisons=comparisons).verdict
            for x, y in zip(a, b, strict=True)
        ]
        share = 1 - found.count("no difference") / REPEATS
        assert low <= share <= high, (comparisons, share)


def test_pairing_narrows_the_interval():
    hard = 3 * normal(N, seed=7)  # some captions are harder for every model
    a, b = hard + normal(N, seed=8) + 0.6, hard + normal(N, seed=9)
    pair = compare(resample(mean_of(a), N), resample(mean_of(b), N), "high")
    apart = compare(resample(mean_of(a), N), resample(mean_of(b.roll(1)), N), "high")  # other captions
    assert pair.difference == pytest.approx(apart.difference)
    assert (pair.high - pair.low) < 0.5 * (apart.high - apart.low)  # sqrt(2) against sqrt(20)
    assert pair.verdict == "better" and apart.verdict == "no difference"


def test_verdicts():
    good, bad = (resample(mean_of(x + 0.1 * normal(N)), N) for x in (0.9, 0.5))
    assert compare(good, bad, "high").verdict == compare(bad, good, "low").verdict == "better"
    assert compare(bad, good, "high").verdict == compare(good, bad, "low").verdict == "worse"
    assert compare(good, bad, "one").verdict == "better"  # 0.9 is nearer to 1
    assert compare(good, bad, "one").difference == pytest.approx(-0.4)
    assert compare(good, bad, "real", real=0.5).verdict == "worse"
    assert compare(good, good, "high").verdict == "no difference"


def test_too_few_or_other_clips():
    few = MIN_CLIPS - 1
    with pytest.raises(ValueError, match="clips=63: too few to rank models; wanted at least 64; raise clips="):
        resample(mean_of(torch.zeros(few)), few)
    a, b = resample(mean_of(torch.zeros(64)), 64), resample(mean_of(torch.zeros(64)), 64, seed=1)
    with pytest.raises(ValueError, match="got 64 clips of seed 0, 64 clips of seed 1; wanted the same clips"):
        compare(a, b, "high")
