"""Diversity within a caption: 1 for the world itself, 0 for repeated clips, monotone in between."""

import pytest
import torch

from fastlightgen.metrics.intervals import compare, resample
from fastlightgen.world.codec import Codec
from fastlightgen.world.diversity import MEASURES, diversity, diversity_statistic, redraw, spreads, true_spreads
from fastlightgen.world.shapes import Shapes

CAPTIONS, DRAWS = 48, 4


@pytest.fixture(scope="module")
def world():
    return Shapes(split="test")


@pytest.fixture(scope="module")
def truth(world):
    return true_spreads(world, CAPTIONS)


@pytest.fixture(scope="module")
def clips(world):
    """Other clips than those of true_spreads, for the same captions."""
    return redraw(world, CAPTIONS, DRAWS)


def test_redraws_keep_captions_and_nothing_else(world, clips):
    own = world.batch(range(CAPTIONS))
    assert clips.captions == [text for text in own.captions for _ in range(DRAWS)] and not clips.has_first.any()
    path = torch.from_numpy(clips.truth["path"])[:, 0].view(CAPTIONS, DRAWS, 2)
    assert (path.std(1) > 0).all()
    turn = torch.from_numpy(clips.truth["turn_frame"]).view(CAPTIONS, DRAWS)
    assert 0.5 < turn.double().var(1).mean() < 0.9  # 2/3 for three equally likely frames
    camera = torch.from_numpy(clips.truth["camera"])[:, -1].view(CAPTIONS, DRAWS, 2)
    assert (camera.double().var(1).mean(0) > 4).all()  # -3.5, 0 and 3.5 pixels on average: 2/3 * 3.5^2 = 8.2
    # The texture is another one: the diagonal bands of frame 0 of two clips are not correlated. A correlation of 100
    # numbers has a standard deviation of 0.1, the mean of 288 pairs of 0.006.
    texture = Codec().encode(clips.video)[:, 3::4, 0].mean(1).flatten(1).view(CAPTIONS, DRAWS, -1)
    texture = texture / texture.norm(dim=-1, keepdim=True)
    others = (texture @ texture.mT)[:, ~torch.eye(DRAWS, dtype=torch.bool)]
    assert abs(others.mean()) < 4 * 0.006


def test_the_true_spread(truth):
    """Three equally likely turn frames have the variance 2/3; the reader misses a few of them."""
    assert truth.shape == (CAPTIONS, len(MEASURES))
    assert truth[:, 1].nanmean() == pytest.approx(2 / 3, rel=0.15)
    assert (truth[:, 0] > 0).all()


def test_data_against_data(clips, truth):
    found = diversity(spreads(clips.video, clips.captions, DRAWS), truth)
    assert found == pytest.approx(1, abs=0.1)


def test_real_clips_are_not_ranked(world):
    """Two sets of real clips for 64 captions; half of the noises repeated is worse."""
    truth = true_spreads(world, 64)
    sets = [redraw(world, 64, DRAWS, start) for start in (4_000_000, 5_000_000)]
    a, b = (spreads(clips.video, clips.captions, DRAWS) for clips in sets)
    half = sets[1].video.view(64, DRAWS, *sets[1].video.shape[1:])[:, [0, 0, 1, 1]].flatten(0, 1)
    a, b, c = (resample(diversity_statistic(s, truth), 64) for s in (a, b, spreads(half, sets[1].captions, DRAWS)))
    assert compare(a, b, "one").verdict == "no difference" and compare(c, a, "one").verdict == "worse"


def test_collapse_is_monotone(clips, truth):
    video = clips.video.view(CAPTIONS, DRAWS, *clips.video.shape[1:])
    found = []
    for kept in (1, 2, 3, 4):  # different clips per caption
        repeated = video[:, torch.arange(DRAWS) % kept].flatten(0, 1)
        found.append(diversity(spreads(repeated, clips.captions, DRAWS), truth))
    print("diversity of 1, 2, 3, 4 different clips:", found)
    assert found[0] == 0 and found == sorted(found) and len(set(found)) == 4
