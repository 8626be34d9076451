"""Energy and persistence of fine texture, by hand and under damage."""

import pytest
import torch

from fastlightgen.metrics.texture import details, energy, persistence


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_details_by_hand():
    patch = torch.tensor([[1.0, 2], [4, 8]]).expand(1, 1, 3, 2, 2)
    expected = [(2 + 8 - 1 - 4) / 2, (4 + 8 - 1 - 2) / 2, (8 - 4 - 2 + 1) / 2]
    assert details(patch)[0, 0, :, 0, 0].tolist() == [e for e in expected for _ in range(3)]
    assert energy(patch).item() == pytest.approx(sum(e * e for e in expected) / 3)


def test_orthonormal_bands_keep_the_energy_of_noise():
    assert energy(noise(2, 4, 3, 33, 33)).tolist() == pytest.approx([1, 1], abs=0.03)
    assert energy(torch.full((1, 2, 3, 8, 8), 0.3)).item() == 0


def test_persistence():
    still = noise(2, 1, 3, 24, 24).expand(2, 6, 3, 24, 24)
    assert persistence(still).tolist() == pytest.approx([1, 1])
    fresh = persistence(noise(2, 6, 3, 24, 24))
    assert (fresh.abs() < 0.1).all()
    # a camera that moves by one pixel a frame, along either axis or both
    wide = noise(1, 1, 3, 32, 32)[0, 0]
    for dy, dx in ((0, 1), (1, 0), (1, 1)):
        clip = torch.stack([wide[:, dy * f : dy * f + 24, dx * f : dx * f + 24] for f in range(6)])[None]
        assert persistence(clip).item() == pytest.approx(1)
    half = (still + noise(2, 6, 3, 24, 24, seed=1)) / 2**0.5  # half the variance persists
    assert persistence(half).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert persistence(torch.zeros(1, 3, 3, 8, 8)).item() == 0  # no texture: nothing persists
