"""HunyuanVideo's pipelines: Llama (or Llava, which also sees the first frame) and CLIP text; latents with one scale.

The first frame is given as condition channels (latent_concat) or replaces latent frame 0 (token_replace).
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.models.encoding import Encoding, picture, wide
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.hunyuan.layers import HunyuanConfig
from fastlightgen.models.streams import Cond

GEOMETRY = Geometry(channels=16, frame_stride=4, pixel_stride=8, patch=2)
TEXT_TOKENS = 256
IMAGE_TOKENS = 576  # Llava's tokens of a picture, which come before the text
INTERLEAVE = {"latent_concat": 2, "token_replace": 4}  # the pipeline keeps every n-th image token


class HunyuanEncoding(Encoding):
    """Encodes clips with a HunyuanVideo pipeline, text-to-video or either kind of image-to-video."""

    geometry, text_tokens = GEOMETRY, TEXT_TOKENS
    cfg: HunyuanConfig

    def __init__(self, folder: Path, pipe: Any, cfg: HunyuanConfig, from_image: bool, device: torch.device):
        super().__init__(folder, pipe, cfg, from_image, device)
        self.kind = cfg.image_condition_type
        if self.kind:  # image tokens count as text; the pipeline cuts 4 tokens of its template
            self.text_tokens += len(range(0, IMAGE_TOKENS, INTERLEAVE[self.kind])) - 4

    @property
    def condition(self) -> str | None:
        return self.kind or super().condition

    def normalisation(self) -> tuple[Tensor, Tensor]:
        return wide([0.0]), wide([self.pipe.vae.config.scaling_factor])

    def text(self, prompt: str, first: NDArray | None) -> dict[str, Tensor]:
        """text, text_len and pooled; for image-to-video the text encoder also sees the first frame."""
        seen = {}
        if self.kind:
            assert first is not None, "image to video needs the first frame"
            seen = {"image": picture(first), "image_embed_interleave": INTERLEAVE[self.kind]}
        text, pooled, mask = self.pipe.encode_prompt(prompt=prompt, device=self.device, **seen)
        length = mask[0].sum().long()
        if not mask[0, :length].all() or length > self.text_tokens:
            raise ValueError(f"{self.folder}/tokenizer: does not pad at the end; set its padding_side to right")
        # For an empty or very long prompt the pipeline returns one token more or less than its constants suggest.
        text = F.pad(text[0, :length], (0, 0, 0, self.text_tokens - int(length)))
        return {"text": text, "text_len": length, "pooled": pooled[0]}

    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """The condition `image`.

        token_replace: the latent of the first frame [C, 1, h, w]. latent_concat: [C + 1, f, h, w], that latent followed
        by zeros, and a mask that is 1 at frame 0.
        """
        latents = self.frame_latents(first, frames, image_condition_type=self.kind)
        if self.kind == "token_replace":
            return {"image": latents[0]}
        latents[:, :, 1:] = 0
        mask = torch.zeros_like(latents[:, :1])
        mask[:, :, 0] = 1
        return {"image": torch.cat([latents, mask], 1)[0]}

    def put_given(self, clip: dict[str, Tensor]) -> None:
        """token_replace: set latent frame 0 to the latent of the picture alone, which the network reads there."""
        if self.kind == "token_replace":
            clip["latents"][:, :1] = clip["image"]

    def shown(self, video: Tensor) -> Tensor:
        """Drop the first `frame_stride` frames of a latent_concat video, as the pipeline does."""
        return video[:, self.geometry.frame_stride :] if self.kind == "latent_concat" else video

    def hint(self, cond: Cond) -> Tensor | None:
        if not self.kind:
            return None
        assert cond.image is not None, "image to video has a condition"
        return cond.image[:, : self.geometry.channels, :1]

    def extra_numbers(self, frame: int) -> int:
        """token_replace stores one latent frame, which is not among the network's input channels."""
        return self.geometry.channels * frame if self.kind == "token_replace" else 0
