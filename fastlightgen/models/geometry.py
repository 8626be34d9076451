"""Sizes of clips in pixels, latents and tokens. F, H, W: latent frames, rows and columns."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The strides of a family's VAE and the patch of its network.

    The first frame of a clip has its own latent frame; each next group of `frame_stride` frames has one.
    """

    channels: int  # channels of a latent
    frame_stride: int  # frames per latent frame
    pixel_stride: int  # pixels per latent row and column
    patch: int  # latent rows and columns per token

    @property
    def step(self) -> int:
        """Pixels per token: a clip's height and width must be multiples of it."""
        return self.pixel_stride * self.patch

    def takes(self, height: int, width: int) -> bool:
        """True if height and width, in pixels, fit."""
        return height >= self.step and width >= self.step and not height % self.step and not width % self.step

    def takes_frames(self, frames: int) -> bool:
        """True if `frames` is frame_stride n + 1."""
        return frames >= 1 and frames % self.frame_stride == 1 % self.frame_stride

    def below(self, frames: int) -> int:
        """A valid number of frames near `frames`, as an example in error messages."""
        return max(1, frames // self.frame_stride * self.frame_stride + 1)

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.frame_stride + 1

    def frames(self, latent_frames: int) -> int:
        """Number of frames that the VAE decodes from `latent_frames` latent frames."""
        return (latent_frames - 1) * self.frame_stride + 1

    def latent(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Latent (F, H, W) of a clip; its size must be valid."""
        return self.latent_frames(frames), height // self.pixel_stride, width // self.pixel_stride

    def size(self, latent: Sequence[int]) -> str:
        """HEIGHTxWIDTHxFRAMES of the clip that a latent (F, H, W) decodes to."""
        frames, height, width = latent
        return f"{height * self.pixel_stride}x{width * self.pixel_stride}x{self.frames(frames)}"

    def latent_size(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Latent (F, H, W) of a clip; raises ValueError for an invalid size."""
        for name, got in (("height", height), ("width", width)):
            if got < self.step or got % self.step:
                raise ValueError(
                    f"size: {name} is {got}; wanted a multiple of {self.step} "
                    f"(VAE {self.pixel_stride}, patch {self.patch}), for example {max(1, 480 // self.step) * self.step}"
                )
        if not self.takes_frames(frames):
            raise ValueError(
                f"size: {frames} frames; wanted {self.frame_stride} n + 1, for example {self.below(frames)}"
            )
        return self.latent(height, width, frames)

    def grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Number of tokens along the frames, rows and columns of a latent."""
        frames, height, width = latent
        return frames, height // self.patch, width // self.patch
