"""HunyuanVideo-1.5's embedders of time, glyphs (ByT5) and pictures (SigLIP). Module names follow diffusers' keys.

Shapes: B batch, T tokens, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.hunyuan.layers import TIME_CHANNELS, embed
from fastlightgen.models.layers import Embedder, sinusoids

GLYPH_WIDTH = 2048  # width of the glyph embedder's hidden layers, whatever the network's


class TimeEmbedder(nn.Module):
    """Embeds the time into one vector [B, D]."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = Embedder(TIME_CHANNELS, dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return embed(self.timestep_embedder, sinusoids(t, TIME_CHANNELS).to(dtype))


class GlyphEmbedder(nn.Module):
    """Turns ByT5's tokens into text tokens [B, T, D]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1, self.linear_2 = nn.Linear(width, GLYPH_WIDTH), nn.Linear(GLYPH_WIDTH, GLYPH_WIDTH)
        self.linear_3 = nn.Linear(GLYPH_WIDTH, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.linear_1(self.norm(x)))
        return self.linear_3(F.gelu(self.linear_2(x)))


class PictureEmbedder(nn.Module):
    """Turns SigLIP's tokens into text tokens [B, T, D]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(dim)
        self.linear_1, self.linear_2 = nn.Linear(width, width), nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.linear_2(F.gelu(self.linear_1(self.norm_in(x)))))
