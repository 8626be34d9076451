"""Wan2.2 TI2V's pipelines: UMT5 text, a VAE of 48 channels; a given first frame is latent frame 0 itself."""

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.models.encoding import pixels
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.wan.encoders import WanEncoding
from fastlightgen.models.wan_ti2v.config import CHANNELS

GEOMETRY = Geometry(channels=CHANNELS, frame_stride=4, pixel_stride=16, patch=2)


class TI2VEncoding(WanEncoding):
    """Encodes clips with a Wan pipeline whose model_index.json has expand_timesteps."""

    geometry = GEOMETRY

    @property
    def condition(self) -> str | None:
        return "first_frame" if self.from_image else None

    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """The condition `image` [1 + C, 1, h, w]: ones, then the latent of the first frame."""
        vae, (shift, scale) = self.pipe.vae, self.normalisation()
        z = vae.encode(pixels(first[None])[None].to(self.device, vae.dtype)).latent_dist.mode()[0].float()
        latent = (z - shift.to(z)) * scale.to(z)
        return {"image": torch.cat([torch.ones_like(latent[:1]), latent])}

    def put_given(self, clip: dict[str, Tensor]) -> None:
        """Set latent frame 0 to the latent of the picture alone, which the network reads there."""
        if self.from_image:
            clip["latents"][:, :1] = clip["image"][1:]

    def extra_numbers(self, frame: int) -> int:
        """The first frame's mask and latent are not among the network's input channels."""
        return (1 + self.geometry.channels) * frame if self.from_image else 0
