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


def shuffle(video, pairs):
    """Exchange this many pairs of neighbouring frames."""
    order = list(range(video.shape[1]))
    for i in (2, 4, 6, 0)[:pairs]:
        order[i], order[i + 1] = i + 1, i
    return video[:, order]


def freeze(video, frames):
    return video[:, torch.arange(video.shape[1]).clamp_max(video.shape[1] - 1 - frames)]


def redden(video, share):
    return (video + share * torch.tensor([1.0, 0, -1]).view(3, 1, 1)).clamp(0, 1)


def noise(video, sigma):
    return video + sigma * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))


def repeat(video, copies):
    return video[: len(video) // copies].repeat(copies, 1, 1, 1, 1)


def checker(video, strength):
    """Add a texture that real clips do not have: a checkerboard."""
    board = torch.arange(video.shape[-1]) + torch.arange(video.shape[-2])[:, None]
    return (video + strength * (1 - 2 * (board % 2))).clamp(0, 1)


def without(video, colours):
    """Replace the clips by others, in which the main shape never has the first of the six colours."""
    clips = Shapes(split="test").batch(range(3 * N, 7 * N))
    return clips.video[torch.from_numpy(clips.truth["main_colour"] >= colours)][: len(video)]


DAMAGE = {  # name: (damage, growing strengths, the metrics that must see every step)
    "blur": (blur, (0.35, 0.4, 0.45), ("frechet", "kid", "precision", "recall", "coverage", "texture")),
    "freeze": (freeze, (1, 3, 6), ("frechet", "kid", "recall", "coverage", "persistence")),
    "slow motion": (slow, (0.8, 0.6, 0.3), ("frechet", "kid", "precision", "recall", "coverage", "persistence")),
    "colour shift": (redden, (0.03, 0.06, 0.12), ("frechet", "kid", "precision", "coverage")),
    "shuffled frames": (shuffle, (1, 2, 4), ("frechet", "kid", "precision", "persistence")),
    "noise": (noise, (0.02, 0.04, 0.06), ("frechet", "kid", "texture", "persistence")),
    "wrong texture": (checker, (0.01, 0.02, 0.04), ("frechet", "kid", "texture", "coverage")),
    "missing colours": (without, (1, 2, 4), ("frechet", "kid", "recall", "coverage")),
    "repeated clips": (repeat, (4, 16, 64), ("frechet", "kid", "coverage")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_grows(name, values, clips, floor):
    damage, strengths, seen = DAMAGE[name]
    found = [values(damage(clips, s)) for s in strengths]
    for metric in GOALS:
        print(f"\n{name:16s}{metric:12s} floor {floor[metric]:8.4f}  ", *(f"{f[metric]:9.4f}" for f in found), end="")
    for metric in seen:
        away = [abs(f[metric] - floor[metric]) for f in found]
        assert 0 < away[0] < away[1] < away[2], metric


def test_direction_of_texture(values, clips, floor):
    """Blur lowers the energy of texture, noise raises it and lowers its persistence."""
    soft, noisy = values(blur(clips, 0.6)), values(noise(clips, 0.05))
    assert soft["texture"] < 0.6 < 0.95 < floor["texture"] < 1.05 < 1.4 < noisy["texture"]
    assert noisy["persistence"] < 0.6 < 0.68 < floor["persistence"] < soft["persistence"]


def test_repeated_clips_lack_recall(values, clips, floor):
    """16 real clips, 16 times each: the Frechet distance is that of a good teacher, but most real clips are missing."""
    found = values(repeat(clips, 16))
    assert found["precision"] > 0.85 and found["frechet"] < 30
    assert found["recall"] < 0.05 < 0.85 < floor["recall"]
    assert found["coverage"] < 0.3 < 0.95 < floor["coverage"]


def test_real_sets_are_not_ranked(statistics):
    world = Shapes(split="test")
    real = mean_of(persistence(world.batch(range(N, 2 * N)).video))
    sets = [world.batch(range(k * N, (k + 1) * N)).video for k in (2, 3, 4)]
    found = [{name: resample(s, N) for name, s in statistics(video).items()} for video in sets]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        for name, goal in GOALS.items():
            away = compare(found[a][name], found[b][name], goal, value(real, N), comparisons=len(GOALS))
            assert away.verdict == "no difference", (a, b, name, away)


def test_damage_is_ranked(statistics, clips):
    """Mild damage on the same captions: paired, the real clips win in what the damage affects."""
    found, worse = ({n: resample(s, N) for n, s in statistics(v).items()} for v in (clips, blur(clips, 0.6)))
    for name in ("frechet", "kid", "precision", "recall", "coverage", "texture"):
        assert compare(found[name], worse[name], GOALS[name], comparisons=len(GOALS)).verdict == "better", name
