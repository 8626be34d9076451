"""How a family uses the VAE and the encoders of a diffusers pipeline: the base class and its helper functions.

Nothing here imports diffusers; the caller passes the loaded pipeline. F frames, f latent frames, C latent channels.
"""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.models.config import NetworkConfig
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.streams import Cond


class Encoding:
    """Encodes text, first frame and latents of one clip with a loaded pipeline; a family overrides the methods."""

    geometry: Geometry
    text_tokens: int  # every text is padded with zeros to this number of tokens

    def __init__(self, folder: Path, pipe: Any, cfg: NetworkConfig, from_image: bool, device: torch.device):
        """`pipe`: the diffusers pipeline of `folder`; `from_image`: True if it starts from a first frame."""
        self.folder, self.pipe, self.cfg, self.from_image, self.device = folder, pipe, cfg, from_image, device

    @property
    def tokens(self) -> dict[str, int]:
        """Number of tokens that the pipeline gives to each text-like condition, padding included."""
        return {"text": self.text_tokens}

    def check(self) -> None:
        """Raise ValueError if the pipeline's VAE is not that of the network."""

    def check_vae(self, channels: int, stride: int) -> None:
        """Raise unless the VAE's latents have the network's channels and pixels."""
        wanted = self.geometry.channels, self.geometry.pixel_stride
        if (channels, stride) != wanted:
            raise ValueError(
                f"{self.folder}/vae: makes latents of {channels} channels, {stride} pixels wide, and this network "
                f"reads {wanted[0]} channels, {wanted[1]} pixels wide; copy the VAE of the network's own pipeline"
            )

    @property
    def condition(self) -> str | None:
        """The way in which the network reads the first frame, as a cache's index.json names it; None without one."""
        return "channels" if self.from_image else None

    @property
    def channels(self) -> int:
        """Channels of a cached clip: those of the latents, and of the condition if it has some."""
        return int(vars(self.cfg)["in_channels"])

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), [C, 1, 1, 1] or [1, 1, 1, 1]: normalised latents are (z - shift) * scale."""
        raise NotImplementedError

    def text(self, prompt: str, first: NDArray | None) -> dict[str, Tensor]:
        """The fields of Cond that come from the prompt: at least text [T, D], zeros beyond text_len, and text_len."""
        raise NotImplementedError

    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """The fields of Cond that come from the first frame, uint8 [H, W, 3], of a clip of `frames` frames."""
        raise NotImplementedError

    def frame_latents(self, first: NDArray, frames: int, **more: Any) -> Tensor:
        """The condition latents [1, K, f, h, w] that the pipeline makes of a first frame, uint8 [H, W, 3].

        `more`: further arguments of the pipeline's `prepare_latents`.
        """
        still = pixels(first[None])[:, 0][None].to(self.device, self.pipe.vae.dtype)  # [1, 3, H, W]
        (height, width), channels = first.shape[:2], self.geometry.channels
        condition = self.pipe.prepare_latents(
            still,
            1,
            channels,
            height=height,
            width=width,
            num_frames=frames,
            dtype=torch.float32,
            device=self.device,
            latents=torch.zeros(1, channels, *self.geometry.latent(height, width, frames)),
            **more,
        )[1]
        return condition

    def put_given(self, clip: dict[str, Tensor]) -> None:
        """Overwrite the part of a clip's `latents` that the condition gives and the network does not predict."""

    def shown(self, video: Tensor) -> Tensor:
        """The frames of a decoded video [3, F, H, W] that the stock pipeline returns."""
        return video

    def hint(self, cond: Cond) -> Tensor | None:
        """Latents [B, C, f, H, W] to mix into the first noise of sampling (see `Wish`), or None."""
        return None

    def extra_numbers(self, frame: int) -> int:
        """How many numbers a clip's condition has outside the network's input channels.

        `frame`: latent rows x columns of the clip.
        """
        return 0


def pixels(frames: NDArray) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255 * 2 - 1


def picture(frame: NDArray) -> Any:
    """uint8 [H, W, 3] as a PIL image."""
    from PIL import Image

    return Image.fromarray(frame)


def wide(values: list[float]) -> Tensor:
    """Shape one number per channel as [C, 1, 1, 1], to broadcast over a latent."""
    return torch.tensor(values).view(-1, 1, 1, 1)
