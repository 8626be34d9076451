"""How a family uses the VAE and the encoders of a diffusers pipeline: the base class, and what all families need.

Nothing here imports diffusers: the loaded pipeline is given. F frames, f latent frames, C channels of a latent.
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
    """Text, first frame and latents of one loaded pipeline, one clip at a time; a family overrides what differs."""

    geometry: Geometry
    text_tokens: int  # every text is filled up with zeros to so many tokens

    def __init__(self, folder: Path, pipe: Any, cfg: NetworkConfig, from_image: bool, device: torch.device):
        """`pipe`: the diffusers pipeline of `folder`; `from_image`: does it start from a first frame?"""
        self.folder, self.pipe, self.cfg, self.from_image, self.device = folder, pipe, cfg, from_image, device

    @property
    def condition(self) -> str | None:
        """How the network is given the first frame, as a cache describes it."""
        return "channels" if self.from_image else None

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), [C, 1, 1, 1] or [1, 1, 1, 1]: normalised latents are (z - shift) * scale."""
        raise NotImplementedError

    def text(self, prompt: str, first: NDArray | None) -> dict[str, Tensor]:
        """The fields of Cond that come from the prompt: at least text [T, D], zeros beyond text_len, and text_len."""
        raise NotImplementedError

    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """The fields of Cond that come from the first frame, uint8 [H, W, 3], of a clip of so many frames."""
        raise NotImplementedError

    def put_given(self, clip: dict[str, Tensor]) -> None:
        """Write into `latents` of an encoded clip what the network is given and does not predict."""

    def shown(self, video: Tensor) -> Tensor:
        """The frames of a decoded video [3, F, H, W] that the pipeline shows."""
        return video

    def hint(self, cond: Cond) -> Tensor | None:
        """Latents [B, C, f, H, W] of which a trace stands in the noise that sampling starts from."""
        return None

    def extra_numbers(self, frame: int) -> int:
        """Numbers of a clip's condition beside the channels of the network's input; `frame`: latent rows x columns."""
        return 0


def pixels(frames: NDArray) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255 * 2 - 1


def picture(frame: NDArray) -> Any:
    """uint8 [H, W, 3] as a PIL image."""
    from PIL import Image

    return Image.fromarray(frame)


def wide(values: list[float]) -> Tensor:
    """One number per channel as [C, 1, 1, 1]."""
    return torch.tensor(values).view(-1, 1, 1, 1)
