"""Features of latents: by hand in NumPy; they tell damaged clips from real ones."""

import numpy as np
import pytest
import torch

from fastlightgen.metrics.kernel import kernel_distance
from fastlightgen.metrics.latent import latent_features
from fastlightgen.world.source import ShapesSource

REAL = ShapesSource(0).held_out(0, 96).x0


def test_the_numbers_are_those_of_numpy():
    x = torch.randn(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    found = latent_features(x).numpy()
    for b, clip in enumerate(x.double().numpy()):
        energies = [np.log((np.diff(clip, axis=axis) ** 2).mean((1, 2, 3)) + 1e-4) for axis in (1, 2, 3)]
        wanted = [clip.mean((1, 2, 3)), clip.std((1, 2, 3), ddof=1), *energies]
        np.testing.assert_allclose(found[b], np.concatenate(wanted), rtol=1e-10)
    assert latent_features(x[:, :, :1])[:, 4:6].abs().max() == 0  # one frame has no differences in time


DAMAGE = {
    "contrast": lambda x, s: x * (1 + s),
    "colour": lambda x, s: x + s * x.std() * torch.tensor([1.0, -1.0] * 6).view(-1, 1, 1, 1),
    "freeze": lambda x, s: (1 - s) * x + s * x[:, :, :1],
    "noise": lambda x, s: x + s * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    "repeats": lambda x, s: x[torch.arange(len(x)) % max(2, int(len(x) * (1 - s)))],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_distance_grows_with_damage(name):
    """Two real sets are near 0; every kind of damage is farther, and more of it farther still."""
    reference, clips = latent_features(REAL[:48]), REAL[48:]
    steps = [kernel_distance(reference, latent_features(DAMAGE[name](clips, s))) for s in (0, 0.3, 0.9)]
    assert abs(steps[0]) < 0.5 * steps[1] and steps[0] < steps[1] < steps[2]
