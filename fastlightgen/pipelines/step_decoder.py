"""The decoder beside the step of `export to=onnx` and `to=executorch`: a function of tensors alone."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastlightgen.config import UserError, parse_size
from fastlightgen.decoder.folder import read_vae, read_vae_config
from fastlightgen.decoder.layout import KINDS
from fastlightgen.decoder.taehv import TinyDecoder, read_tiny
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.encoding import Encoding
from fastlightgen.models.families import family_of
from fastlightgen.models.geometry import Geometry

MOST_PIXELS = 1.2e6  # of a clip that is decoded for a comparison: 17 frames of 256 x 256, minutes of a released decoder


class Decoder(nn.Module):
    """Normalised latents [1, C, f, h, w] to frames [1, 3, F, H, W] in [0, 1]."""

    def __init__(self, vae: Any, encoding: Encoding):
        """`vae`: diffusers' class, or a tiny decoder; `encoding`: of the family, knows scales and what is shown."""
        super().__init__()
        self.vae, self.encoding = vae, encoding
        if not isinstance(vae, TinyDecoder):
            self.shift, self.scale = encoding.normalisation()

    def forward(self, latents: Tensor) -> Tensor:
        if isinstance(self.vae, TinyDecoder):
            video = self.vae.decode(latents)
        else:
            video = self.vae.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return (self.encoding.shown(video[0])[None] * 0.5 + 0.5).clamp(0, 1)


def read_decoder(vae: str, model: VideoDiT, image: bool) -> Decoder:
    """The decoder of a VAE folder, or a file in TAEHV's layout; raises ValueError if it is not for this network.

    `image`: the student takes a first frame.
    """
    family = family_of(model.config)
    if Path(vae).is_file():
        decoder: Any = read_tiny(vae, family.geometry)
    else:
        folder, config = read_vae_config(vae)
        check_fits(vae, config, family.geometry)
        decoder = read_vae(folder)
    pipe = SimpleNamespace(vae=decoder)
    return Decoder(decoder, family.encoding(Path(), pipe, model.cfg, image, torch.device("cpu"))).eval()


def check_fits(vae: str, config: dict[str, Any], geometry: Geometry) -> None:
    kind = KINDS[config["_class_name"]]
    got = tuple(config.get(key) for key in (kind.latent, kind.temporal, kind.spatial))
    wanted = (geometry.channels, geometry.frame_stride, geometry.pixel_stride)
    if got != wanted:
        raise UserError(
            f"vae={vae}: decodes latents of {got[0]} channels, {got[1]} frames and {got[2]} pixels, and the student "
            f"makes {wanted[0]}, {wanted[1]} and {wanted[2]}; give a VAE of the student's family"
        )


def decoder_example(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random latents of the size that a folder has."""
    return {"latents": torch.randn(settings["latent"], generator=torch.Generator().manual_seed(0))}


def is_runnable(size: str) -> bool:
    """Whether a clip of SIZE, height x width x frames, is decoded for a comparison."""
    return math.prod(parse_size(size)) <= MOST_PIXELS
