"""The Frechet distance against closed forms, and its response to damage."""

import pytest
import torch

from fastlightgen.metrics.frechet import features, frechet, gaussian_distance
from fastlightgen.world.shapes import Shapes

N = 320


@pytest.fixture(scope="module")
def sets():
    world = Shapes(split="test")
    video, reference = world.batch(range(N)).video, features(world.batch(range(N, 2 * N)).video)
    return video, reference, frechet(reference, features(video))


def test_gaussians_in_closed_form():
    # commuting covariances: sum of (mean difference)^2 + (deviation difference)^2, here in a rotated frame
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    mean_a, mean_b = torch.tensor([[1.0, 2, 3], [1.5, 2, 1]]).double()
    dev_a, dev_b = torch.tensor([[1.0, 2, 0.5], [3.0, 1, 0]]).double()
    cov_a, cov_b = (q * d**2 @ q.T for d in (dev_a, dev_b))
    expected = 0.25 + 4 + (4 + 1 + 0.25)
    assert abs(gaussian_distance(mean_a, cov_a, mean_b, cov_b) - expected) < 1e-6
    assert abs(gaussian_distance(mean_b, cov_b, mean_a, cov_a) - expected) < 1e-6


def test_gaussians_that_do_not_commute():
    # 2x2: Tr (A B)^1/2 = sqrt(Tr AB + 2 sqrt(det AB)), from the eigenvalues' sum and product
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    cross = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    zero = torch.zeros(2).double()
    assert abs(gaussian_distance(zero, a, zero, b) - float(3 + 4 - 2 * cross)) < 1e-9


def test_features_are_in_units_of_the_reference():
    x = torch.randn(4000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert abs(frechet(x, x)) < 1e-9
    # a shift of one feature by one standard deviation costs 1 in any unit
    shifted = x.clone()
    shifted[:, 2] += x[:, 2].std()
    unit = torch.tensor([1.0, 50, 0.1, 7, 2])
    assert abs(frechet(x * unit, shifted * unit) - 1) < 1e-9
    # the first argument is the reference: halving every deviation costs 5 (1 - 1/2)^2, the other way round 5 (2 - 1)^2
    centred = 10 * (x - x.mean(0))
    assert abs(frechet(centred, centred / 2) - 1.25) < 1e-6 and abs(frechet(centred / 2, centred) - 5) < 1e-6


def blur(video, sigma):
    taps = torch.exp(-(torch.arange(-2, 3.0) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    x = torch.nn.functional.pad(video.flatten(0, 2)[:, None], (2, 2, 2, 2), mode="replicate")
    return torch.nn.functional.conv2d(x, taps[:, None] @ taps[None, :] + torch.zeros(1, 1, 5, 5)).view_as(video)


def slow(video, speed):  # time runs at `speed`; frames in between are blends
    at = torch.arange(video.shape[1]) * speed
    low = at.floor().long().clamp_max(video.shape[1] - 2)
    part = (at - low).view(-1, 1, 1, 1)
    return video[:, low] * (1 - part) + video[:, low + 1] * part


def swap(video, pairs):  # exchange this many pairs of neighbouring frames
    order = list(range(video.shape[1]))
    for i in (2, 4, 6, 0)[:pairs]:
        order[i], order[i + 1] = i + 1, i
    return video[:, order]


def freeze(video, frames):  # the last frames repeat the one before them
    order = [min(i, video.shape[1] - 1 - frames) for i in range(video.shape[1])]
    return video[:, order]


def grey(video, share):
    return video + share * (video.mean(2, keepdim=True) - video)


DAMAGE = {
    "blur": (blur, (0.4, 0.6, 1.0)),
    "freeze": (freeze, (1, 3, 6)),
    "slow motion": (slow, (0.8, 0.6, 0.3)),
    "colour shift": (lambda v, s: (v + s * torch.tensor([1.0, 0, -1]).view(3, 1, 1)).clamp(0, 1), (0.03, 0.06, 0.12)),
    "desaturation": (grey, (0.1, 0.25, 0.5)),
    "contrast": (lambda v, s: ((v - 0.25) * s + 0.25).clamp(0, 1), (1.1, 1.25, 1.6)),
    "frame order": (swap, (1, 2, 4)),
    "noise": (lambda v, s: v + s * torch.randn(v.shape, generator=torch.Generator().manual_seed(2)), (0.01, 0.03, 0.1)),
}


def test_floor_is_low(sets):
    # N against N of the same world: about D (D + 1) / 4N for the covariances, less where features are correlated
    _, reference, floor = sets
    dims = reference.shape[1]
    print(f"\nfloor {floor:.2f} with {dims} features")
    assert 0 < floor < dims * (dims + 1) / (4 * N)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_grows(sets, name):
    video, reference, floor = sets
    damage, strengths = DAMAGE[name]
    values = [frechet(reference, features(damage(video, s))) for s in strengths]
    print(
        f"\n{name:13s} floor {floor:6.2f}  "
        + "  ".join(f"{s}: {v:8.2f}" for s, v in zip(strengths, values, strict=True))
    )
    assert floor * 1.5 < values[0] < values[1] < values[2]
