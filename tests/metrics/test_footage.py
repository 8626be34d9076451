"""Scores of any clip against hand-computed values: movement, repetition, flicker, drift of colour."""

import math

import pytest
import torch

from fastlightgen.metrics import footage, video

BLACK, WHITE, RED, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255)


def flat(*colours) -> torch.Tensor:
    """A clip of frames of one colour each, or of one grey level."""
    rows = [c if isinstance(c, tuple) else (c, c, c) for c in colours]
    return torch.tensor(rows, dtype=torch.uint8).view(-1, 1, 1, 3).expand(-1, 8, 8, 3)


def textured(frames: int, step: int, size: int = 128) -> torch.Tensor:
    """A clip in which everything moves to the left by `step` pixels a frame."""
    wide = torch.randint(0, 256, (size, size + frames * step, 3), generator=torch.Generator().manual_seed(0))
    return torch.stack([wide[:, k * step : k * step + size] for k in range(frames)]).byte()


def test_movement():
    """3 of 128 pixels a frame, 8 frames a second: 18.75 % a second. The leftmost of 8 columns of blocks leaves."""
    moving = footage.movement(textured(4, 3), 8.0)
    assert 18.75 * 7 / 8 <= moving <= 18.75 * 9 / 8
    assert 37.5 * 7 / 8 <= footage.movement(textured(7, 2), 24.0) <= 37.5 * 9 / 8  # every third frame is compared
    assert footage.movement(textured(4, 0), 8.0) == 0
    noise = torch.randint(0, 3, (4, 128, 128, 3), generator=torch.Generator().manual_seed(1))
    assert footage.movement((textured(4, 0) // 2 + noise).byte(), 8.0) == 0
    assert math.isnan(footage.movement(flat(1, 2), 24.0))  # 3 frames are one eighth of a second


def test_flicker():
    assert footage.flicker(flat(100, 110, 100, 110, 100)) == pytest.approx(5.0, abs=1e-4)
    assert footage.flicker(flat(100, 110, 120, 130)) == pytest.approx(0.0, abs=1e-4)
    assert math.isnan(footage.flicker(flat(100, 110)))


def test_repetition():
    assert footage.repetition(flat(10, 60, 110, 160, 10, 60, 110, 160)) == 1.0  # a loop
    assert footage.repetition(flat(10, 60, 110, 160, 210, 160, 110, 60)) == pytest.approx(3 / 4)  # back: 1 of 4 is new
    assert footage.repetition(flat(10, 30, 50, 70, 90, 110)) == 0.0
    assert footage.repetition(flat(10, 10, 10, 10)) == 0.0  # it never left
    # 10 of the 40 levels of its way are missing when it comes back: 1 - 10 / 40 in one of two frames
    assert footage.repetition(flat(10, 50, 90, 20)) == pytest.approx((0 + 1 - 10 / 70) / 2)


def test_lab_of_known_colours():
    """Values of the sRGB primaries as they are tabulated for D65."""
    colours = torch.tensor([WHITE, BLACK, RED, BLUE], dtype=torch.float64) / 255
    wanted = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    torch.testing.assert_close(footage.lab(colours), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=0.02)


def test_colour_drift():
    drift, gain = footage.colour_drift(flat(WHITE, BLUE, RED))  # the frame between does not count
    assert drift == pytest.approx(math.dist((100, 0, 0), (53.24, 80.09, 67.20)), abs=0.05)
    assert gain == pytest.approx(math.hypot(80.09, 67.20), abs=0.05)
    assert footage.colour_drift(flat(RED, WHITE))[1] == pytest.approx(-gain)


def test_frame_by_frame_equals_the_whole_clip():
    clip = textured(9, 2, size=24)
    whole = clip.permute(0, 3, 1, 2)[None].float() / 255
    found = footage.values_of(clip, 8.0)
    assert found["temporal_flickering"] == pytest.approx(float(video.temporal_flickering(whole)))
    assert found["motion_smoothness"] == pytest.approx(float(video.motion_smoothness_lin(whole)))
    for name, measure in footage.LOOK.items():
        assert found[name] == pytest.approx(float(measure(whole))), name
    assert set(found) | {"naturalness"} == set(footage.MEANING)


def test_evenly_spread():
    assert footage.spread(3, 5) == [0, 1, 2] and footage.spread(9, 3) == [0, 4, 8]
