"""The codec of the built-in world: exact, orthonormal, centred."""

import pytest
import torch

from fastlightgen.data.frames import to_uint8
from fastlightgen.world import codec
from fastlightgen.world.shapes import Shapes


@pytest.fixture(scope="module")
def video():
    return Shapes(split="test").batch(range(256)).video


def test_codec_is_exact_and_orthonormal(video):
    c, x = codec.Codec(), video[:64]
    z = c.encode(x)
    assert z.shape == (64, 12, 8, 10, 10)
    # fp32 rounding of numbers up to 5 (latents) and 1 (pixels), a few operations each
    torch.testing.assert_close(c.decode(z), x, rtol=0, atol=1e-6)
    noise = torch.randn(2, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(c.encode(c.decode(noise)), noise, rtol=0, atol=2e-6)
    # the low band of one 2x2 patch by hand, and the energy of a difference
    by_hand = (x[0, 2, 1, 4:6, 6:8].sum() / 2 - codec.LOW_MEAN) * codec.SCALE
    torch.testing.assert_close(z[0, 4, 2, 2, 3], by_hand, rtol=1e-5, atol=1e-6)
    energy = (x[1] - x[0]).double().square().sum() * codec.SCALE**2
    torch.testing.assert_close((z[1] - z[0]).double().square().sum(), energy, rtol=1e-5, atol=0)


def test_low_bands_have_mean_0():
    """On the clips of which LOW_MEAN was taken, to its four digits."""
    low = sum(2 * Shapes().batch(range(i, i + 256)).video.double().mean() for i in range(0, 1024, 256)) / 4
    assert abs(low - codec.LOW_MEAN) < 0.5e-4


def test_latents_are_weaker_than_the_noise(video):
    """Their standard deviation is 0.42, that of the noise is 1. So the ladder's shift cannot be judged by pixels."""
    assert abs(codec.Codec().encode(video).std() - 0.42) < 0.01


def test_condition_channels():
    z = torch.randn(2, 12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    out = codec.condition(z, torch.tensor([True, False]))
    assert out.shape == (2, 13, 3, 4, 4) and not out[1].any() and not out[0, :, 1:].any()
    assert (out[0, 0, 0] == 1).all() and torch.equal(out[0, 1:, 0], z[0, :, 0])


def test_to_uint8():
    assert to_uint8(torch.tensor([-0.5, 0.0, 0.5, 1.0, 7.0])).tolist() == [0, 0, 128, 255, 255]
