"""Naturalness: fits against distributions with known exponents, the contrast map and the distance against formulas."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from fastlightgen.metrics.natural import Moments, contrast_map, distance, fitted, patch_features, patch_size

PLACES = [(i + 0.5) / 20_000 for i in range(20_000)]


def test_a_normal_distribution_has_exponent_2_and_scale_sqrt_2():
    x = torch.tensor([[3 * NormalDist().inv_cdf(p) for p in PLACES]])
    shape, left, right = (float(v) for v in fitted(x))
    assert shape == pytest.approx(2, abs=0.01)
    assert left == pytest.approx(right) == pytest.approx(3 * math.sqrt(2), rel=0.01)


def test_a_laplace_distribution_has_exponent_1_and_its_two_scales():
    """Left of 0 with scale 1, right with scale 2, and as much mass on a side as its scale."""
    half = [-math.log(1 - p) for p in PLACES]
    x = torch.tensor([[-v for v in half[::2]] + [2 * v for v in half]])
    shape, left, right = (float(v) for v in fitted(x))
    assert shape == pytest.approx(1, abs=0.01)
    assert (left, right) == (pytest.approx(1, rel=0.01), pytest.approx(2, rel=0.01))


def test_the_contrast_map_is_that_of_the_equations():
    """In the middle of a 7 x 7 picture, by sums in float64 over the Gaussian window; a flat picture has no contrast."""
    x = torch.rand(1, 7, 7, generator=torch.Generator().manual_seed(0)) * 255
    place = np.arange(-3, 4)
    weight = np.exp(-0.5 * (place[:, None] ** 2 + place**2) / (7 / 6) ** 2)
    weight /= weight.sum()
    levels = x[0].double().numpy()
    mean = (weight * levels).sum()
    deviation = math.sqrt((weight * (levels - mean) ** 2).sum())
    assert float(contrast_map(x)[0, 3, 3]) == pytest.approx((levels[3, 3] - mean) / (deviation + 1), rel=1e-4)
    assert contrast_map(torch.full((1, 9, 9), 80.0)).abs().max() < 1e-4


def test_the_distance_is_that_of_two_normal_distributions():
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 36, generator=draw, dtype=torch.float64) * s + m for n, s, m in ((90, 1, 0), (70, 2, 0.5)))
    away = a.numpy().mean(0) - b.numpy().mean(0)
    cov = (np.cov(a.numpy().T) + np.cov(b.numpy().T)) / 2
    assert distance(Moments.of(a), Moments.of(b)) == pytest.approx(math.sqrt(away @ np.linalg.inv(cov) @ away))
    both = Moments.of(torch.cat([a, b]))
    assert distance(both - Moments.of(b), Moments.of(b)) == pytest.approx(distance(Moments.of(a), Moments.of(b)))
    assert math.isnan(distance(both, Moments.of(a[:1])))


def natural_noise(seed: int, size: int = 192) -> torch.Tensor:
    """A picture [size,size] whose amplitudes fall with frequency as those of photographs do."""
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid(torch.fft.fftfreq(size), torch.fft.fftfreq(size), indexing="ij")
    amplitude = 1 / (y.square() + x.square()).sqrt().clamp_min(1 / size)
    picture = torch.fft.ifft2(torch.fft.fft2(noise) * amplitude).real
    return (128 + 40 * picture / picture.std()).clamp(0, 255)


def test_blur_and_noise_are_less_natural_than_another_picture():
    real = Moments.of(patch_features(torch.stack([natural_noise(s) for s in range(6)]), 64))
    other = torch.stack([natural_noise(s) for s in range(6, 10)])
    blurred = torch.nn.functional.avg_pool2d(other, 3, 1, 1)
    noisy = (other + 10 * torch.randn(other.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 255)
    own, blur, noise = (distance(real, Moments.of(patch_features(x, 64))) for x in (other, blurred, noisy))
    assert 2 * own < blur and 2 * own < noise


def test_flat_patches_and_small_pictures_count_not():
    assert len(patch_features(torch.full((1, 96, 96), 30.0), 32)) == 0
    assert [patch_size(h, w) for h, w in ((95, 400), (96, 96), (144, 176), (480, 832))] == [0, 32, 48, 96]
