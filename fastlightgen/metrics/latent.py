"""Features of latent clips, for data whose VAE is not at hand: simple statistics of each channel.

Shapes: latents x0 [B, C, F, H, W].
"""

import torch
from torch import Tensor


def latent_features(x0: Tensor) -> Tensor:
    """Return float64 [B, 5 C]: mean, deviation, and log energy of the differences in time, rows and columns.

    They see brightness and colour (mean), contrast and saturation (deviation), motion (time), detail (rows, columns).
    """
    x = x0.detach().double()
    energies = [_energy(x, axis) for axis in (2, 3, 4)]
    return torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4)), *energies], 1)


def _energy(x: Tensor, axis: int) -> Tensor:
    """The log of the mean squared difference of neighbours along an axis: [B, C]; an axis of length 1 has none."""
    if x.shape[axis] == 1:
        return x.new_zeros(x.shape[:2])
    return (x.diff(dim=axis).square().mean((2, 3, 4)) + 1e-4).log()
