"""HunyuanVideo-1.5's pipelines: Qwen2.5-VL text, ByT5 glyphs of quoted words, SigLIP tokens of the first frame."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.models.encoding import Encoding, picture, pixels, wide
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.hunyuan15.config import Hunyuan15Config

GEOMETRY = Geometry(channels=32, frame_stride=4, pixel_stride=16, patch=1)
TEXT_TOKENS, GLYPHS = 1000, 256  # of Qwen2.5-VL and of ByT5
IMAGE_TOKENS = 729  # SigLIP's, of 27 x 27 patches


class Hunyuan15Encoding(Encoding):
    """Encodes clips with a HunyuanVideo-1.5 pipeline, text-to-video or image-to-video."""

    geometry, text_tokens = GEOMETRY, TEXT_TOKENS
    cfg: Hunyuan15Config

    def __init__(self, folder: Path, pipe: Any, cfg: Hunyuan15Config, from_image: bool, device: torch.device):
        super().__init__(folder, pipe, cfg, from_image, device)
        if pipe is not None:  # it was loaded without the network, of which it knows these
            pipe.target_size, pipe.vision_states_dim = cfg.target_size, cfg.image_embed_dim

    def check(self) -> None:
        vae = self.pipe.vae.config
        self.check_vae(vae.latent_channels, vae.spatial_compression_ratio)

    @property
    def tokens(self) -> dict[str, int]:
        return super().tokens | {"text_2": GLYPHS, "image_embeds": IMAGE_TOKENS}

    @property
    def channels(self) -> int:
        return self.cfg.in_channels if self.from_image else self.geometry.channels

    def normalisation(self) -> tuple[Tensor, Tensor]:
        return wide([0.0]), wide([self.pipe.vae.config.scaling_factor])

    def text(self, prompt: str, first: NDArray | None) -> dict[str, Tensor]:
        """text and text_len; text_2 and text_2_len, the quoted words, which many prompts lack."""
        text, mask, glyphs, own = self.pipe.encode_prompt(prompt=prompt, device=self.device)
        return {
            **self.padded("text", "tokenizer", text[0], mask[0]),
            **self.padded("text_2", "tokenizer_2", glyphs[0], own[0]),
        }

    def padded(self, name: str, part: str, text: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """A text with zeros beyond its length, and the length."""
        mask = mask.bool()  # the pipeline has it in the text encoder's type, and bfloat16 cannot count to 257
        length = mask.sum()
        if not mask[: int(length)].all():
            raise ValueError(f"{self.folder}/{part}: does not pad at the end; set its padding_side to right")
        return {name: F.pad(text[: int(length)], (0, 0, 0, len(text) - int(length))), f"{name}_len": length}

    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """Condition channels `image` [C + 1, f, h, w], the frame's latent, then zeros, and a mask; image_embeds."""
        vae = self.pipe.vae
        latent = vae.encode(pixels(first[None])[None].to(self.device, vae.dtype)).latent_dist.mode()[0].float()
        given = torch.cat([latent * vae.config.scaling_factor, torch.ones_like(latent[:1])])
        embeds = self.pipe.encode_image(picture(first), 1, self.device, torch.float32)[0]
        return {"image": F.pad(given, (0, 0, 0, 0, 0, self.geometry.latent_frames(frames) - 1)), "image_embeds": embeds}

    def extra_numbers(self, frame: int) -> int:
        """The numbers in SigLIP's tokens and in those of the quoted words."""
        glyphs = GLYPHS * self.cfg.text_embed_2_dim
        vit = self.pipe.image_encoder.config if self.from_image else None
        return glyphs + ((vit.image_size // vit.patch_size) ** 2 * vit.hidden_size if vit else 0)
