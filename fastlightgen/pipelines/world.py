"""A diffusers pipeline in the role of a world: encode prompts and pictures, decode latents to uint8 [B, F, H, W, 3]."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.config import parse_size
from fastlightgen.data.frames import read_image, to_uint8
from fastlightgen.models.folder.released import sampling
from fastlightgen.models.folder.weights import read_card
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.sample import Wish
from fastlightgen.pipelines.encoders import Encoders, family_of_folder

ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")


class Pipeline:
    """The VAE and the encoders of a pipeline folder, without its network."""

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        size: str = "",
        decode_only=False,
        vae: str = "",
        card: Mapping[str, Any] = MappingProxyType({}),
    ):
        """`vae`: what decodes in place of the pipeline's VAE, see `Encoders.decode_with`. `card`: of the network, whose
        clips are the default."""
        _, family = family_of_folder(folder)
        self.defaults = dict(sampling(folder).values)
        clips = family.clips.at(self.defaults["size"]).of(card or read_card(folder))
        self.family, self.size = family, read_size(size or clips.size, family.geometry)
        # Training decodes previews and has little memory left: decode in tiles, and leave out the encoders.
        self.encoders = Encoders(folder, device, dtype, tiling=decode_only, without=ENCODERS if decode_only else ())
        if vae:
            self.encoders.decode_with(vae)
        self.official_negative = self.encoders.official_negative
        self.nulls: dict[str, dict[str, Tensor]] = {}
        self.fps = round(clips.fps)

    def wish(self, prompt: str, negative: str | None, image: str, count: int) -> Wish:
        """Encode a request for `count` clips. `negative`: the null prompt; None if there is no second prediction."""
        if (needed := self.encoders.takes_image) is not None and bool(image) != needed:
            wanted = "needs a picture: give image=FILE" if needed else "takes no picture: leave image= out"
            raise ValueError(f"image={image}: this pipeline {wanted}")
        (height, width, frames), first = self.size, None
        shared: dict[str, Tensor] = {}
        if image:
            first = (read_image(image, height, width) * 255).round().byte().permute(1, 2, 0).numpy()
            shared = self.encoders.image(first, frames)
        text = self.encoders.text(prompt, first)
        if negative is not None and negative not in self.nulls:
            self.nulls[negative] = self.encoders.null(negative, (height, width))
        null = text if negative is None else self.nulls[negative]
        # The null condition differs in its text only. Its other tensors must be the same objects: a walk then computes
        # their hidden states once for both.
        fields, blanks = ({k: v.expand(count, *v.shape) for k, v in f.items()} for f in (text | shared, null))
        cond, blank = self.family.cond(**fields), self.family.cond(**fields | blanks)
        geometry = self.family.geometry
        shape = (count, geometry.channels, *geometry.latent(height, width, frames))
        return Wish(shape, cond, blank, self.encoders.encoding.hint(cond))

    def release(self) -> None:
        """Free the text and image encoders; the VAE stays."""
        for name in ENCODERS:
            if hasattr(self.encoders.pipe, name):
                setattr(self.encoders.pipe, name, None)

    def frames(self, latents: Tensor) -> NDArray:
        """Decode latents [B, C, f, h, w] to uint8 frames [B, F, H, W, 3]."""
        video = torch.stack([self.encoders.decode(x).float().cpu() for x in latents])  # [B, 3, F, H, W] in [-1, 1]
        return np.ascontiguousarray(to_uint8(video * 0.5 + 0.5).permute(0, 2, 3, 4, 1).numpy())


def read_size(text: str, geometry: Geometry) -> tuple[int, int, int]:
    """Parse a size such as 480x832x81 as (height, width, frames); raises ValueError if it does not fit `geometry`."""
    height, width, frames = parse_size(text)
    if not geometry.takes(height, width) or not geometry.takes_frames(frames):
        n = geometry.frame_stride
        raise ValueError(
            f"size={text}: height and width must be multiples of {geometry.step}, "
            f"frames {n}k+1 ({n + 1}, {2 * n + 1}, ... {20 * n + 1})"
        )
    return height, width, frames
