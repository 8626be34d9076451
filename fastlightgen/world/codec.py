"""The lossless codec of the built-in world: pixels [B,F,3,H,W] <-> latents [B,12,F,H/2,W/2]."""

import torch
from torch import Tensor

# Mean of the low band, which is twice the mean pixel, on the first 1024 training clips. It centres the low bands.
LOW_MEAN = 0.5185
SCALE = 3.0  # so small that a visible texture has little energy and is decided late; see drawing.MOSAIC

# Rows: the low, horizontal, vertical and diagonal band of the pixels (00, 01, 10, 11) of a 2x2 patch. The matrix is
# orthonormal and symmetric, so it is its own inverse.
_HAAR = 0.5 * torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


class Codec:
    """A 2x2 Haar transform of each frame (channel = 4 * colour + band); low bands are centred, all are scaled."""

    channels, stride = 12, 2

    def encode(self, video: Tensor) -> Tensor:
        """[B,F,3,H,W] -> [B,12,F,H/2,W/2]."""
        b, f, c, h, w = video.shape
        assert c == 3 and h % 2 == 0 and w % 2 == 0, video.shape
        # [b, c, 4 pixels of a patch, f * h/2 * w/2 patches]
        patches = video.reshape(b, f, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 6, 1, 3, 5).reshape(b, c, 4, -1)
        bands = _HAAR.to(video) @ patches
        bands[:, :, 0] -= LOW_MEAN
        return (bands * SCALE).reshape(b, 12, f, h // 2, w // 2)

    def decode(self, latents: Tensor) -> Tensor:
        """[B,12,F,h,w] -> [B,F,3,2h,2w], not clamped to [0, 1]."""
        b, c, f, h, w = latents.shape
        assert c == 12, latents.shape
        bands = latents.reshape(b, 3, 4, -1) / SCALE
        bands[:, :, 0] += LOW_MEAN
        patches = (_HAAR.to(latents) @ bands).reshape(b, 3, 2, 2, f, h, w)
        return patches.permute(0, 4, 1, 5, 2, 6, 3).reshape(b, f, 3, 2 * h, 2 * w)


def condition(latents: Tensor, has_first: Tensor) -> Tensor:
    """Wan's image-to-video channels [B,1+12,F,h,w]: a mask with 1 in frame 0, then the latents of frame 0.

    All channels are zero for clips whose first frame is not given (`has_first` [B] is false).
    """
    out = latents.new_zeros(latents.shape[0], 1 + latents.shape[1], *latents.shape[2:])
    out[:, 0, 0] = 1.0
    out[:, 1:, 0] = latents[:, :, 0]
    return out * has_first.to(latents).view(-1, 1, 1, 1, 1)
