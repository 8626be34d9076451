"""The exact codec of the built-in world: pixels [B,F,3,H,W] <-> latents [B,12,F,H/2,W/2], orthonormal up to a scale."""

import torch
from torch import Tensor

# measured on 4096 training clips of data=shapes: mean of the low band (twice the mean pixel), standard deviation of all
LOW_MEAN = 0.4432
SCALE = 6.81

# rows: low, horizontal, vertical, diagonal band of the pixels (00, 01, 10, 11) of a 2x2 patch; its own inverse
_HAAR = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


class Codec:
    """Per frame a 2x2 Haar transform (channel = 4 * colour + band), the low bands centred, everything times SCALE."""

    channels, stride = 12, 2

    def encode(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] -> [B,12,F,H/2,W/2]."""
        b, f, c, h, w = video.shape
        assert c == 3 and h % 2 == 0 and w % 2 == 0, video.shape
        patches = video.reshape(b, f, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 6, 1, 3, 5).reshape(b, c, 4, -1)
        bands = _HAAR.to(video) @ patches
        bands[:, :, 0] -= LOW_MEAN
        return (bands * SCALE).reshape(b, 12, f, h // 2, w // 2)

    def decode(self, latents: Tensor) -> Tensor:
        """[B,12,F,h,w] -> [B,F,3,2h,2w]; clamps nothing."""
        b, c, f, h, w = latents.shape
        assert c == 12, latents.shape
        bands = latents.reshape(b, 3, 4, -1) / SCALE
        bands[:, :, 0] += LOW_MEAN
        patches = (_HAAR.to(latents) @ bands).reshape(b, 3, 2, 2, f, h, w)
        return patches.permute(0, 4, 1, 5, 2, 6, 3).reshape(b, f, 3, 2 * h, 2 * w)


def condition(latents: Tensor, has_first: Tensor) -> Tensor:
    """Wan's image-to-video channels [B,1+12,F,h,w]: a mask that marks frame 0 as given, then the latents of frame 0.

    Everything is zero for the clips [B] whose first frame is not given.
    """
    out = latents.new_zeros(latents.shape[0], 1 + latents.shape[1], *latents.shape[2:])
    out[:, 0, 0] = 1.0
    out[:, 1:, 0] = latents[:, :, 0]
    return out * has_first.to(latents).view(-1, 1, 1, 1, 1)
