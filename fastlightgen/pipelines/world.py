"""A diffusers pipeline as a world: conditions from words and pictures, frames from latents; uint8 [B, F, H, W, 3]."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.data.frames import read_image, to_uint8
from fastlightgen.models.base import Cond
from fastlightgen.models.folder.weights import read_json
from fastlightgen.models.sample import Wish
from fastlightgen.pipelines.encoders import STRIDE, Encoders, kind_of

ENCODERS = ("text_encoder", "text_encoder_2", "image_encoder")


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
