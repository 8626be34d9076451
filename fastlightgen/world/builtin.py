"""Sampling in the built-in world: turns prompts and pictures into conditions, and latents into frames."""

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.data.frames import read_image, to_uint8
from fastlightgen.models.base import Cond
from fastlightgen.models.sample import Wish
from fastlightgen.world.captions import pool, tokenise
from fastlightgen.world.codec import Codec, condition
from fastlightgen.world.shapes import Shapes


class BuiltIn:
    """Moving shapes. Clips are 20 x 20 pixels, so frames are enlarged 16 times."""

    fps, scale = 6, 16
    official_negative = ""  # there is none
    defaults = {"steps": 50, "guidance": 2.0, "shift": 3.0}  # the values of the tiny presets

    def __init__(self, size: str = ""):
        if size:
            raise ValueError(f"size={size}: clips of the built-in world have one size; leave size= out")
        self.shapes = Shapes()

    def wish(self, prompt: str, negative: str | None, image: str, count: int) -> Wish:
        """Latent shape and conditions for `count` clips of a prompt; `image` names a file for the first frame."""
        side = self.shapes.size
        first = read_image(image, side, side) if image else torch.zeros(3, side, side)
        # The codec works frame by frame, and only frame 0 is read as a condition: repeat it for the others.
        latents = Codec().encode(first.expand(count, self.shapes.frames, -1, -1, -1))
        channels = condition(latents, torch.full((count,), bool(image)))
        (text, length), (null, null_length) = tokenise([prompt]), tokenise([negative or ""])
        cond, blank = (
            Cond(words.expand(count, -1, -1), n.expand(count), channels, pooled=pool(words, n).expand(count, -1))
            for words, n in ((text, length), (null, null_length))
        )
        return Wish(tuple(latents.shape), cond, blank)

    def release(self) -> None:
        """Free the encoders; this world has none."""

    def frames(self, latents: Tensor) -> NDArray:
        """Decode latents to enlarged uint8 frames [B, F, H, W, 3]."""
        frames = to_uint8(Codec().decode(latents.float().cpu())).permute(0, 1, 3, 4, 2).numpy()
        return frames.repeat(self.scale, 2).repeat(self.scale, 3)
