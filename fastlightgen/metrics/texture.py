"""Fine texture of clips [B,F,3,H,W] in [0,1]: its energy, and how far it persists from frame to frame."""

import torch
from torch import Tensor

SHIFTS = 1  # pixels per frame, along each axis, that persistence allows the whole picture to move
PIECE = 4  # clips at a time, so that their details stay in the cache


def details(video: Tensor) -> Tensor:
    """The finest Haar bands (horizontal, vertical, diagonal) of all 2x2 patches: float64 [B,F,9,H-1,W-1].

    All patches, not every second one, so that a picture that moves by one pixel keeps its bands (Coifman and Donoho
    1995, Translation-invariant de-noising).
    """
    x = video.detach().double()
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    horizontal = (across[..., :-1, :] + across[..., 1:, :]) / 2
    vertical = (down[..., :-1] + down[..., 1:]) / 2
    return torch.cat([horizontal, vertical, across.diff(dim=-2) / 2], 2)


def energy(video: Tensor) -> Tensor:
    """Mean square of the details of each clip [B]; blur lowers it, noise raises it."""
    return torch.cat([details(piece).square().mean((1, 2, 3, 4)) for piece in video.split(PIECE)])


def persistence(video: Tensor) -> Tensor:
    """Correlation of the details of neighbouring frames, mean over the clip's frames [B]: 1 for a still clip.

    Each pair of frames is compared at the best of nine shifts of the whole picture, by -1, 0 or 1 pixel along each
    axis, so that a moving camera does not count as a change. Noise that is new in every frame brings it near 0.
    """
    return torch.cat([_persistence(details(piece)) for piece in video.split(PIECE)])


def _persistence(x: Tensor) -> Tensor:
    """The persistence of clips whose details are x."""
    n, (height, width) = SHIFTS, x.shape[-2:]
    before = x[:, :-1, :, n : height - n, n : width - n].flatten(2)
    best = torch.full(before.shape[:2], -1.0, dtype=x.dtype, device=x.device)
    for dy in range(2 * n + 1):
        for dx in range(2 * n + 1):
            after = x[:, 1:, :, dy : dy + height - 2 * n, dx : dx + width - 2 * n].flatten(2)
            best = torch.maximum(best, torch.cosine_similarity(before, after, dim=-1))  # the bands have mean zero
    return best.mean(1)
