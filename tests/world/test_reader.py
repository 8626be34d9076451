"""The reader of the built-in world: near-perfect on real clips, at chance on shuffled captions, graceful on damage."""

import numpy as np
import pytest
import torch

from fastlightgen.world import reader
from fastlightgen.world.captions import caption, parse
from fastlightgen.world.shapes import Shapes

N = 384


@pytest.fixture(scope="module")
def clips():
    return Shapes(split="test").batch(range(N))


@pytest.fixture(scope="module")
def reading(clips):
    return reader.read(clips.video)


def blur(video, sigma):
    taps = torch.exp(-(torch.arange(-2, 3.0) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    x = torch.nn.functional.pad(video.flatten(0, 2)[:, None], (2, 2, 2, 2), mode="replicate")
    return torch.nn.functional.conv2d(x, taps[:, None] @ taps[None, :] + torch.zeros(1, 1, 5, 5)).view_as(video)


def test_real_clips(clips, reading):
    score, attributes = reader.adherence(reading, clips.captions)
    print(f"real: adherence {score.mean():.4f} {attributes}")
    assert score.mean() >= 0.999 and min(attributes.values()) >= 0.998
    there = clips.truth["companion_colour"] >= 0
    assert (reading.present.sum(1) == 1 + there).mean() >= 0.999


def test_two_thousand_training_clips():
    world = Shapes()
    parts = [world.batch(range(start, start + 250)) for start in range(0, 2000, 250)]
    scores = np.concatenate([reader.adherence(reader.read(part.video), part.captions)[0] for part in parts])
    assert len(scores) == 2000 and scores.mean() >= 0.999


def test_texture_noise_is_ignored(clips):
    """Grey levels that are off by 0.05 up or down in each pixel, about as much as the mosaic itself."""
    gen = torch.Generator().manual_seed(0)
    grey = 0.05 * (torch.randint(2, clips.video[:, :, :1].shape, generator=gen) * 2 - 1)
    score, attributes = reader.adherence(reader.read(clips.video + grey), clips.captions)
    assert score.mean() >= 0.999 and min(attributes.values()) >= 0.995


def test_positions_of_real_clips(clips, reading):
    exact, allowed = reader.exact_error(reading, clips.truth), reader.tracking_error(reading, clips.captions)
    ratio = reader.motion(reading, clips.captions)
    print(f"exact {exact.mean():.3f} px, allowed {allowed.mean():.3f} px, motion {ratio.mean():.3f}")
    assert exact.mean() < 0.15 and np.quantile(exact, 0.99) < 0.35
    assert (allowed <= exact + 1e-6).all()  # the true path is one of the allowed paths, with equal weights
    assert abs(ratio.mean() - 1) < 0.03


def test_shuffled_captions_are_at_chance(reading, clips):
    # A random clip has the captioned colour with 1/6 + 5/6 * 1/2 * 1/5 = 1/4 (as main shape or companion). Given that,
    # and by uniform captions: kind 1/3, direction 1/4, speed 1/2, change 3 (1/5)^2 + 4 (1/10)^2 = .16 for "goes on",
    # "stops", "turns back" and the four sides. So .25, .0833, .0625, .125, .04. The cast is right with 1/2 * 1/6 for a
    # lone caption and 1/2 * 1/15 for a pair, the companion's kind with 1/4 * 1/3. Six statements (lone) or seven:
    lone = (0.25 + 0.0833 + 0.0625 + 0.125 + 0.04 + 0.0833) / 6
    pair = (0.25 + 0.0833 + 0.0625 + 0.125 + 0.04 + 0.0333 + 0.0833) / 7
    chance = (lone + pair) / 2  # .102
    order = np.random.default_rng(0).permutation(N)
    score, attributes = reader.adherence(reading, [clips.captions[i] for i in order])
    print(f"shuffled: adherence {score.mean():.4f}, chance {chance:.4f} {attributes}")
    assert abs(score.mean() - chance) < 0.05


def test_imperfect_clips(clips):
    noise = torch.randn(clips.video.shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.5, 0.7):
        got = reader.read(blur(clips.video, sigma) + 0.05 * noise)
        score, attributes = reader.adherence(got, clips.captions)
        error = np.nanmean(reader.tracking_error(got, clips.captions))
        print(f"blur {sigma} noise .05: adherence {score.mean():.4f}, tracking {error:.3f} px {attributes}")
        assert score.mean() >= 0.95 and error < 0.25


def test_each_attribute_is_judged_on_its_own(clips, reading):
    # change one word of a caption: that statement fails in nearly every clip, the others stay
    for name, slot, classes in (("kind", 1, 3), ("direction", 2, 4), ("speed", 3, 2)):
        said = [list(parse(text)) for text in clips.captions]
        for s in said:
            s[slot] = (s[slot] + 1) % classes
        _, attributes = reader.adherence(reading, [caption(*s) for s in said])
        assert attributes[name] < 0.02 and attributes["colour"] > 0.98 and attributes["cast"] > 0.98
    said = [parse(text)._replace(other=None) for text in clips.captions]
    _, attributes = reader.adherence(reading, [caption(*s) for s in said])
    assert abs(attributes["cast"] - 0.5) < 0.1 and np.isnan(attributes["companion"])


def test_grey_video_shows_nothing(clips):
    grey = clips.video.mean(2, keepdim=True).expand_as(clips.video)
    got = reader.read(grey)
    score, _ = reader.adherence(got, clips.captions)
    assert not got.present.any() and (got.kind == -1).all() and score.max() == 0
    assert np.isnan(reader.tracking_error(got, clips.captions)).all()


def test_frozen_and_slow_clips_move_less(clips):
    # Frame 0 repeated: no motion. Half of the frames, each twice: about half the path in the same time.
    still = reader.read(clips.video[:, :1].expand(-1, 8, -1, -1, -1))
    assert np.nanmean(reader.motion(still, clips.captions)) < 1e-6
    goes_on = np.flatnonzero(clips.truth["change"] == 0)
    slow = reader.read(clips.video[goes_on][:, [0, 0, 1, 1, 2, 2, 3, 3]])
    assert abs(np.nanmean(reader.motion(slow, [clips.captions[i] for i in goes_on])) - 3 / 7) < 0.03


def test_first_frame_psnr():
    video = torch.zeros(3, 2, 3, 4, 4)
    first = torch.stack([torch.full((3, 4, 4), value) for value in (0.1, 0.01, 0.0)])
    mean, each = reader.first_frame_psnr(video, first, torch.tensor([True, True, False]))
    # mse .01 is 20 dB, mse .0001 is 40 dB, equal frames give 100 dB
    torch.testing.assert_close(each, torch.tensor([20.0, 40.0, 100.0]), atol=1e-3, rtol=0)
    assert abs(mean - 30) < 1e-3
