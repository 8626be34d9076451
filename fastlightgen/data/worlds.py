"""What sampling needs besides a network: conditions from words and pictures, and frames from latents.

Two worlds: the built-in one, and a diffusers pipeline's VAE and encoders. Frames are uint8 [B, F, H, W, 3].
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.data.codec import Codec, condition, to_uint8
from fastlightgen.data.encoders import STRIDE, Encoders, kind_of
from fastlightgen.data.frames import read_image
from fastlightgen.data.synthetic import Shapes, pool, tokenise
from fastlightgen.models.base import Cond
from fastlightgen.models.weights import read_json
from fastlightgen.rng import generator

ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")


@dataclass
class Wish:
    """One clip to make: its conditions and the shape of its latents, batch first."""

    shape: tuple[int, ...]
    cond: Cond
    null: Cond
    hint: Tensor | None = None  # a thousandth of it stands in the first noise, as HunyuanVideo's image to video has it

    def start(self, seed: int, device: torch.device) -> Tensor:
        """What sampling starts from."""
        noise = torch.randn(self.shape, generator=generator(seed)).to(device)
        return noise if self.hint is None else 0.999 * noise + 0.001 * self.hint.to(device)

    def to(self, device: torch.device) -> "Wish":
        return replace(self, cond=self.cond.map(lambda x: x.to(device)), null=self.null.map(lambda x: x.to(device)))


class BuiltIn:
    """Moving shapes: 16 pixels wide, so they are enlarged to be seen."""

    fps, scale = 6, 16
    defaults = {"steps": 50, "guidance": 3.0, "shift": 3.0}  # as the tiny presets have them

    def __init__(self, size: str = ""):
        if size:
            raise ValueError(f"size={size}: clips of the built-in world have one size; leave size= out")
        self.shapes = Shapes()

    def wish(self, prompt: str, negative: str | None, image: str, count: int) -> Wish:
        side = self.shapes.size
        first = read_image(image, side, side) if image else torch.zeros(3, side, side)
        # The codec works frame by frame, so the first frame can stand for all of them.
        latents = Codec().encode(first.expand(count, self.shapes.frames, -1, -1, -1))
        channels = condition(latents, torch.full((count,), bool(image)))
        (text, length), (null, null_length) = tokenise([prompt]), tokenise([negative or ""])
        cond, blank = (
            Cond(words.expand(count, -1, -1), n.expand(count), channels, pooled=pool(words, n).expand(count, -1))
            for words, n in ((text, length), (null, null_length))
        )
        return Wish(tuple(latents.shape), cond, blank)

    def release(self) -> None:
        """Nothing is held."""

    def frames(self, latents: Tensor) -> NDArray:
        frames = to_uint8(Codec().decode(latents.float().cpu())).permute(0, 1, 3, 4, 2).numpy()
        return frames.repeat(self.scale, 2).repeat(self.scale, 3)


class Pipeline:
    """The VAE and the encoders of a pipeline folder; the network is not its business."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, size: str = "", decode_only=False):
        _, self.kind = kind_of(folder)
        height, width = self.kind.buckets[0]
        self.size = read_size(size or f"{height}x{width}x{self.kind.frames}")
        # Training has little memory to spare for a look at its clips: in tiles.
        self.encoders = Encoders(folder, device, dtype, tiling=decode_only, without=ENCODERS if decode_only else ())
        self.nulls: dict[str, dict[str, Tensor]] = {}
        self.fps, self.defaults = round(self.kind.fps), defaults_of(folder, self.kind.family, self.encoders.network)

    def wish(self, prompt: str, negative: str | None, image: str, count: int) -> Wish:
        """`negative`: None where no second prediction is made, which saves its encoding."""
        if bool(image) != self.kind.image:
            wanted = "needs a picture: give image=FILE" if self.kind.image else "takes no picture: leave image= out"
            raise ValueError(f"image={image}: this pipeline {wanted}")
        (height, width, frames), first = self.size, None
        if image:
            first = (read_image(image, height, width) * 255).round().byte().permute(1, 2, 0).numpy()
        shared = self.encoders.image(first, frames) if image else {}
        text = self.encoders.text(prompt, first)
        if negative is not None and negative not in self.nulls:
            self.nulls[negative] = self.encoders.null(negative, (height, width))
        null = text if negative is None else self.nulls[negative]
        cond, blank = (
            Cond(**{k: v.expand(count, *v.shape) for k, v in (fields | shared).items()}) for fields in (text, null)
        )
        blank = replace(blank, image=cond.image, image_embeds=cond.image_embeds)  # what a walk shares stays shared
        channels = self.encoders.vae.config.get("z_dim") or self.encoders.vae.config.latent_channels
        hint = cond.image[:, :channels, :1] if self.encoders.condition else None
        return Wish((count, channels, (frames - 1) // 4 + 1, height // 8, width // 8), cond, blank, hint)

    def release(self) -> None:
        """Let the text and image encoders go; the VAE stays."""
        for name in ENCODERS:
            if hasattr(self.encoders.pipe, name):
                setattr(self.encoders.pipe, name, None)

    def frames(self, latents: Tensor) -> NDArray:
        video = torch.stack([self.encoders.decode(x).float().cpu() for x in latents])  # [B, 3, F, H, W] in [-1, 1]
        return np.ascontiguousarray(to_uint8(video * 0.5 + 0.5).permute(0, 2, 3, 4, 1).numpy())


def read_size(text: str) -> tuple[int, int, int]:
    """480x832x81 as (height, width, frames)."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(n.isdigit() and int(n) for n in numbers):
        raise ValueError(f"size={text}: wanted HEIGHTxWIDTHxFRAMES, for example 480x832x81")
    height, width, frames = map(int, numbers)
    if height % STRIDE or width % STRIDE or frames % 4 != 1:
        raise ValueError(f"size={text}: height and width must be multiples of {STRIDE}, frames 4k+1 (5, 9, ... 81)")
    return height, width, frames


def defaults_of(folder: Path, family: str, network: dict) -> dict:
    """Steps, guidance and shift for a network that says nothing itself; the scheduler's settings hold the shift."""
    path = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(path) if path.is_file() else {}
    shift = settings.get("flow_shift") or settings.get("shift") or (5.0 if family == "wan" else 7.0)
    guidance = 5.0 if family == "wan" else 6.0 if network.get("guidance_embeds") else 1.0
    return {"steps": 50, "guidance": guidance, "shift": shift}
