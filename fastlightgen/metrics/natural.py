"""Naturalness of pictures without a network, after NIQE: how far are the statistics of fine contrast from real ones?

Mittal, Soundararajan and Bovik 2013, Making a "completely blind" image quality analyzer (IEEE SPL 20(3)). Blur, blocks
of a codec, noise and invented texture change these statistics. Differences to NIQE: the real statistics come from the
real videos at hand; a clip is compared with the most similar of them, as cameras and scenes differ more than faults do;
all patches count, not the sharp ones only; and patches are smaller where pictures are small.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOBES = 7  # pixels per side of the Gaussian window; its standard deviation is LOBES / 6
PATCH = 96  # pixels per side of a patch, as in NIQE; smaller where a side of the picture has fewer than 288
SMALLEST = 96  # pixels per side of a picture; smaller ones hold too few patches
SHAPES = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64)  # exponents of the generalised normal distribution


def patch_size(height: int, width: int) -> int:
    """Pixels per side of the patches of a picture; 0: the picture is too small to measure."""
    side = min(height, width)
    return min(PATCH, 16 * (side // 48)) if side >= SMALLEST else 0


def contrast_map(grey: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised levels (x - m) / (s + 1) of pictures [n,H,W] in 0..255.

    m and s are the mean and the standard deviation around each pixel, under a Gaussian window (equations 1 to 3).
    """
    place = torch.arange(LOBES, dtype=grey.dtype, device=grey.device) - LOBES // 2
    weight = torch.exp(-0.5 * (place / (LOBES / 6)) ** 2)
    weight = weight / weight.sum()

    def blurred(x: Tensor) -> Tensor:
        x = F.pad(x[:, None], (LOBES // 2,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(x, weight.view(1, 1, 1, -1)), weight.view(1, 1, -1, 1))[:, 0]

    mean = blurred(grey)
    deviation = (blurred(grey.square()) - mean.square()).clamp_min(0).sqrt()
    return (grey - mean) / (deviation + 1)


def fitted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit an asymmetric generalised normal distribution to each row of x [n,m]: (exponent, left, right scale).

    By moments (Lasmar, Stitou and Berthoumieu 2009): with g the ratio of the deviations left and right of 0 and
    r = mean |x|^2 / mean x^2, the exponent a solves G(2/a)^2 / (G(1/a) G(3/a)) = r (g^3 + 1)(g + 1) / (g^2 + 1)^2.
    """
    x = x.double()
    left, right = (_deviation(x, side) for side in (x < 0, x > 0))
    g = left / right.clamp_min(1e-12)
    r = x.abs().mean(1).square() / x.square().mean(1).clamp_min(1e-24)
    wanted = r * (g**3 + 1) * (g + 1) / (g**2 + 1).square()
    found = torch.exp(2 * torch.lgamma(2 / SHAPES) - torch.lgamma(1 / SHAPES) - torch.lgamma(3 / SHAPES))  # rising
    shape = SHAPES[torch.searchsorted(found, wanted.clamp(float(found[0]), float(found[-1])).contiguous())]
    unit = torch.exp((torch.lgamma(1 / shape) - torch.lgamma(3 / shape)) / 2)  # scale over deviation
    return shape, left * unit, right * unit


def _deviation(x: Tensor, side: Tensor) -> Tensor:
    """Root mean square of the values on one side of 0."""
    return ((x.square() * side).sum(1) / side.sum(1).clamp_min(1)).sqrt()


def patch_features(grey: Tensor, patch: int) -> Tensor:
    """36 features of each patch of pictures [n,H,W] in 0..255, without flat patches: float64 [m,36].

    At full and at half resolution: exponent and scale of the contrast map; exponent, mean and both scales of its
    products with the neighbour to the right, below, and on the two diagonals.
    """
    half = F.interpolate(grey[:, None], scale_factor=0.5, mode="bicubic", antialias=True)[:, 0]
    rows, columns = grey.shape[-2] // patch, grey.shape[-1] // patch
    scales = ((grey, patch), (half, patch // 2))
    found = torch.cat([_features(_patches(contrast_map(x), size, rows, columns)) for x, size in scales], 1)
    return found[found[:, 1] > 1e-3]


def _patches(x: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """Cut maps [n,H,W] into patches: [n x rows x columns, size, size]."""
    return x[:, : rows * size, : columns * size].unfold(1, size, size).unfold(2, size, size).flatten(0, 2)


def _features(x: Tensor) -> Tensor:
    """18 features of patches [m,P,P] of a contrast map: [m,18]."""
    shape, left, right = fitted(x.flatten(1))
    out = [shape, (left + right) / 2]
    pairs = (
        (x[:, :, :-1], x[:, :, 1:]),
        (x[:, :-1], x[:, 1:]),
        (x[:, :-1, :-1], x[:, 1:, 1:]),
        (x[:, 1:, :-1], x[:, :-1, 1:]),
    )
    for a, b in pairs:
        shape, left, right = fitted((a * b).flatten(1))
        mean = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
        out += [shape, mean, left, right]
    return torch.stack(out, 1)


@dataclass(frozen=True)
class Moments:
    """Number, sum and sum of outer products of patch features, so that sets can be added and taken away."""

    count: int
    total: Tensor  # [36]
    outer: Tensor  # [36,36]

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def cov(self) -> Tensor:
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def distance(real: Moments, made: Moments) -> float:
    """NIQE's distance sqrt(d^T ((A + B) / 2)^-1 d) of the normal distributions of two sets; nan for under two patches.

    d is the difference of the means, A and B the covariances.
    """
    if min(real.count, made.count) < 2:
        return float("nan")
    away = real.mean - made.mean
    # Directions in which neither set varies are left out: a pseudo-inverse, as in NIQE.
    inverse = torch.linalg.pinv((real.cov + made.cov) / 2, rtol=1e-8, hermitian=True)
    return float((away @ inverse @ away).clamp_min(0).sqrt())
