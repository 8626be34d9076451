"""Each metric that ranks models: its floor between real sets, its response to growing damage, and no false ranking."""

import pytest
import torch
from torch.nn.functional import conv2d, pad

from fastlightgen.metrics.coverage import Regions
from fastlightgen.metrics.frechet import features, frechet_statistic
from fastlightgen.metrics.intervals import compare, mean_of, resample, value
from fastlightgen.metrics.kernel import kernel_statistic
from fastlightgen.metrics.texture import energy, persistence
from fastlightgen.world.shapes import Shapes

N = 256
GOALS = {
    "frechet": "low",
    "kid": "low",
    "precision": "high",
    "recall": "high",
    "coverage": "high",
    "density": "one",
    "texture": "one",
    "persistence": "real",
}


@pytest.fixture(scope="module")
def reference():
    return Shapes(split="test").batch(range(N, 2 * N)).video


@pytest.fixture(scope="module")
def clips():
    return Shapes(split="test").batch(range(N)).video


@pytest.fixture(scope="module")
def statistics(reference):
    real, fine = features(reference), energy(reference).mean()

    def of(video):
        feats = features(video)
        regions = Regions(real, feats)
        return {
            "frechet": frechet_statistic(real, feats),
            "kid": kernel_statistic(real, feats),
            "precision": regions.precision(),
            "recall": regions.recall(),
            "coverage": regions.coverage(),
            "density": regions.density(),
            "texture": mean_of(energy(video) / fine),
            "persistence": mean_of(persistence(video)),
        }

    return of


@pytest.fixture(scope="module")
def values(statistics):
    def of(video):
        return {name: value(statistic, len(video)) for name, statistic in statistics(video).items()}

    return of


@pytest.fixture(scope="module")
def floor(values, clips):
    return values(clips)


def blur(video, sigma):
    taps = torch.exp(-(torch.arange(-2, 3.0) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    x = pad(video.flatten(0, 2)[:, None], (2, 2, 2, 2), mode="replicate")
    return conv2d(x, (taps[:, None] @ taps[None])[None, None]).view_as(video)


def slow(video, speed):
    """Let time run at `speed`; frames in between are blends."""
    at = torch.arange(video.shape[1]) * speed
    low = at.floor().long().clamp_max(video.shape[1] - 2)
    part = (at - low).view(-1, 1, 1, 1)
    return video[:, low] * (1 - part) + video[:, low + 1] * part


def shuffle(video, frames):
    """Turn the order of the last frames round."""
    order = torch.arange(video.shape[1])
    order[video.shape[1] - frames :] = order[video.shape[1] - frames :].flip(0)
    return video[:, order]


def freeze(video, frames):
    return video[:, torch.arange(video.shape[1]).clamp_max(video.shape[1] - 1 - frames)]


def redden(video, share):
    return (video + share * torch.tensor([1.0, 0, -1]).view(3, 1, 1)).clamp(0, 1)


def noise(video, sigma):
    return video + sigma * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))


def repeat(video, copies):
    return video[: len(video) // copies].repeat(copies, 1, 1, 1, 1)


DAMAGE = {  # name: (damage, growing strengths, the metrics that must see each step)
    "blur": (blur, (0.4, 0.6, 1.0), ("frechet", "kid", "texture", "precision")),
    "freeze": (freeze, (1, 3, 6), ("frechet", "kid", "persistence")),
    "slow motion": (slow, (0.8, 0.6, 0.3), ("frechet", "kid")),
    "colour shift": (redden, (0.03, 0.06, 0.12), ("frechet", "kid", "precision")),
    "shuffled frames": (shuffle, (2, 4, 8), ("frechet", "kid")),
    "noise": (noise, (0.02, 0.05, 0.1), ("frechet", "kid", "texture", "persistence", "precision")),
    "repeated clips": (repeat, (4, 16, 64), ("frechet", "kid", "recall", "coverage")),
}


def distance(name, found, floor):
    """How far a score is from the one of real clips."""
    return abs(found[name] - floor[name])


def test_floor(floor):
    print("\nfloor", {name: round(v, 4) for name, v in floor.items()})


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_grows(name, values, clips, floor):
    damage, strengths, seen = DAMAGE[name]
    found = [values(damage(clips, s)) for s in strengths]
    for metric in GOALS:
        print(f"\n{name:16s}{metric:12s} floor {floor[metric]:8.4f}  ", *(f"{f[metric]:9.4f}" for f in found), end="")
