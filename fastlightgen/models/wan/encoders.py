"""Wan2.1's pipelines: UMT5 text, CLIP image tokens and condition channels; latents normalised per channel."""

from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.models.encoding import Encoding, picture, wide
from fastlightgen.models.geometry import Geometry
from fastlightgen.models.wan.layers import TEXT_TOKENS

GEOMETRY = Geometry(channels=16, frame_stride=4, pixel_stride=8, patch=2)


class WanEncoding(Encoding):
    """Encodes clips with a Wan pipeline, text-to-video or image-to-video."""

    geometry, text_tokens = GEOMETRY, TEXT_TOKENS

    def check(self) -> None:
        vae = self.pipe.vae.config
        self.check_vae(vae.z_dim, vae.scale_factor_spatial)
        reads, has = getattr(self.cfg, "image_dim", None) is not None, (self.folder / "image_encoder").is_dir()
        if self.from_image and reads != has:
            said = "reads CLIP tokens, as Wan2.1's" if reads else "reads no CLIP tokens, as Wan2.2's"
            raise ValueError(
                f"{self.folder}: its network {said}, and the pipeline has {'an' if has else 'no'} image_encoder/; give "
                "a network and a pipeline of one release"
            )

    def normalisation(self) -> tuple[Tensor, Tensor]:
        cfg = self.pipe.vae.config
        return wide(cfg.latents_mean), 1.0 / wide(cfg.latents_std)

    def text(self, prompt: str, first: NDArray | None) -> dict[str, Tensor]:
        text = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens, device=self.device
        )[0][0]
        return {"text": text, "text_len": text.any(-1).sum()}  # the pipeline writes zeros after the last token

    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """Condition channels `image` [K, f, h, w] (a mask and the latents of the frame), and CLIP's image_embeds."""
        condition = self.frame_latents(first, frames)
        out = {"image": condition[0]}
        if self.pipe.image_encoder is not None:
            out["image_embeds"] = self.pipe.encode_image(picture(first), self.device)[0]
        return out

    def extra_numbers(self, frame: int) -> int:
        """The numbers in CLIP's image tokens, the class token included."""
        if not self.from_image or self.pipe.image_encoder is None:
            return 0
        vit = self.pipe.image_encoder.config
        return ((vit.image_size // vit.patch_size) ** 2 + 1) * vit.hidden_size
