"""Weight-free clip metrics against hand-computed values."""

import torch

from fastlightgen.metrics import video as metrics


def levels(*values, size=4):
    """One clip of flat grey frames at these 8-bit levels."""
    return torch.tensor(values).view(1, -1, 1, 1, 1).expand(1, -1, 3, size, size) / 255


def close(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_temporal_flickering():
    close(metrics.temporal_flickering(levels(10, 10, 10)), [1.0])
    close(metrics.temporal_flickering(levels(0, 51, 0)), [(255 - 51) / 255])


def test_motion_smoothness():
    close(metrics.motion_smoothness_lin(levels(0, 10, 20, 30, 40)), [1.0])
    # odd frames 1 and 3 are off by 30 and by 0; frame 5 has no successor
    close(metrics.motion_smoothness_lin(levels(0, 30, 0, 0, 0, 200)), [1 - 15 / 255])


def test_saturation():
    clip = torch.zeros(1, 1, 3, 1, 3)
    clip[0, 0, :, 0, 1] = torch.tensor([200.0, 100, 50]) / 255
    clip[0, 0, :, 0, 2] = 1.0
    close(metrics.saturation(clip), [(0 + 150 / 200 + 0) / 3])


def test_sharpness():
    close(metrics.sharpness(levels(80)), [0.0])
    clip = torch.zeros(1, 1, 3, 4, 4)
    clip[0, 0, :, 1, 1] = 100 / 255
    # inner 2x2 Laplacians: -400, 100, 100, 0; mean -50, mean square 45000
    close(metrics.sharpness(clip), [45000.0 - 2500.0])


def test_brightness_and_contrast():
    close(metrics.brightness(levels(10, 40)), [25.0])
    close(metrics.contrast(levels(10, 40)), [0.0])
    clip = torch.zeros(1, 2, 3, 1, 2)
    clip[0, 0, :, 0, 0] = 100 / 255  # levels 100 and 0: deviation 50; the second frame is black
    close(metrics.contrast(clip), [25.0])
    close(metrics.brightness(clip), [25.0])


def test_colourfulness():
    close(metrics.colourfulness(levels(80)), [0.0])
    clip = torch.zeros(1, 1, 3, 1, 2)
    clip[0, 0, 0, 0, 0] = 200 / 255  # a red pixel and a black one: red - green 200, 0; yellow - blue 100, 0
    close(metrics.colourfulness(clip), [(1 + 0.3) * (100**2 + 50**2) ** 0.5])


def test_frame_difference():
    close(metrics.frame_difference(levels(10, 40, 30)), [20.0])
