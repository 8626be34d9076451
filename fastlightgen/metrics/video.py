"""Metrics of clips [B,F,3,H,W] in [0,1] that need no network; each returns float64 [B], one number per clip."""

import torch
from torch import Tensor

from fastlightgen.data.frames import to_uint8

GREY = (0.299, 0.587, 0.114)  # Rec. 601 weights of red, green, blue


def _levels(video: Tensor) -> Tensor:
    """The 8-bit levels 0..255 that a viewer sees."""
    return to_uint8(video).double()


def temporal_flickering(video: Tensor) -> Tensor:
    """VBench's score (255 - mean |frame[i+1] - frame[i]|) / 255: 1 for a still clip."""
    return 1 - _levels(video).diff(dim=1).abs().mean((1, 2, 3, 4)) / 255


def motion_smoothness_lin(video: Tensor) -> Tensor:
    """VBench's score, with linear instead of learned interpolation: (255 - mean |odd - (prev + next) / 2|) / 255."""
    x = _levels(video)
    middle = (x[:, :-2:2] + x[:, 2::2]) / 2  # predicts each odd frame from the even frames around it
    return 1 - (x[:, 1:-1:2] - middle).abs().mean((1, 2, 3, 4)) / 255


def saturation(video: Tensor) -> Tensor:
    """Mean HSV saturation, (max - min) / max over the channels; 0 for black."""
    x = _levels(video)
    high = x.amax(2)
    return ((high - x.amin(2)) / high.clamp_min(1)).mean((1, 2, 3))


def sharpness(video: Tensor) -> Tensor:
    """Variance within a frame of the 4-neighbour Laplacian of the grey level 0..255, mean over the frames."""
    x = _grey(video)
    laplace = x.diff(n=2, dim=-1)[..., 1:-1, :] + x.diff(n=2, dim=-2)[..., 1:-1]
    return laplace.flatten(2).var(-1, correction=0).mean(1)


def brightness(video: Tensor) -> Tensor:
    """Mean grey level, 0..255."""
    return _grey(video).mean((1, 2, 3))


def contrast(video: Tensor) -> Tensor:
    """Standard deviation within a frame of the grey level 0..255, mean over the frames."""
    return _grey(video).flatten(2).std(-1, correction=0).mean(1)


def colourfulness(video: Tensor) -> Tensor:
    """Colourfulness after Hasler and Suesstrunk (2003), mean over the frames: 0 grey, 33 moderate, 82 high."""
    red, green, blue = _levels(video).flatten(3).unbind(2)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])  # the opponent colours rg and yb of their paper
    spread, offset = opponents.std(-1, correction=0), opponents.mean(-1)
    return (spread.norm(dim=0) + 0.3 * offset.norm(dim=0)).mean(1)


def frame_difference(video: Tensor) -> Tensor:
    """Mean |frame[i+1] - frame[i]| in levels 0..255: 0 for a still clip."""
    return 255 * (1 - temporal_flickering(video))


def _grey(video: Tensor) -> Tensor:
    """Grey levels 0..255, [B,F,H,W]."""
    return (_levels(video) * torch.tensor(GREY, dtype=torch.float64, device=video.device).view(3, 1, 1)).sum(2)
