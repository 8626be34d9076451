"""Encode videos, captions and first frames with a diffusers pipeline's VAE, text and image encoders; decode latents.

Clips are encoded one at a time, so that a result does not depend on the other clips of a batch. Latents are the mode of
the VAE's posterior, not a sample: the same video always gives the same numbers. F frames, f latent frames.
"""

import hashlib
import json
import warnings
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fastlightgen.decoder.folder import check_replaces, read_vae
from fastlightgen.decoder.taehv import TinyDecoder, read_tiny
from fastlightgen.files.border import opened, read_json
from fastlightgen.files.schema import record
from fastlightgen.models.encoding import pixels
from fastlightgen.models.families import FAMILIES, family_of, family_of_pipeline
from fastlightgen.models.family import Family
from fastlightgen.models.folder.index import read_index
from fastlightgen.models.folder.manifest import verify_files
from fastlightgen.pipelines.stock import need_diffusers


def family_of_folder(folder: str | Path) -> tuple[str, Family]:
    """The pipeline class that model_index.json names, and its family."""
    try:
        index = read_index(folder)
    except ValueError as err:
        raise ValueError(f"pipeline={folder}: is not a diffusers pipeline folder ({err})") from None
    name, family = index["_class_name"], family_of_pipeline(index)
    if family is None:
        known = dict.fromkeys(pipeline for f in FAMILIES.values() for pipeline in f.pipelines)
        raise ValueError(f"pipeline={folder}: is a {name}; wanted one of {', '.join(known)}")
    return name, family


class Encoders:
    """The VAE and the encoders of a pipeline folder, without its network. VAE and image encoder compute in float32."""

    def __init__(
        self,
        folder: str | Path,
        device="cpu",
        dtype: torch.dtype = torch.float32,
        tiling: bool = False,
        without=(),
        first_frame: bool = False,
    ):
        """`without`: parts to leave out. `first_frame`: clips have one, if the pipeline takes one or none."""
        self.folder, self.device = Path(folder), torch.device(device)
        self.name, self.family = family_of_folder(folder)
        self.takes_image = self.family.pipelines[self.name]  # None: it may get one
        if first_frame and self.takes_image is False:
            raise ValueError(f"first_frame=true: {self.name} of {folder} takes no first frame; leave first_frame= out")
        self.from_image = first_frame or bool(self.takes_image)
        self.official_negative = self.family.negatives.get(self.name, "")  # "": none is published
        self.network = read_config(self.folder / "transformer")
        if "in_channels" not in self.network:
            raise ValueError(f"pipeline={folder}: has no transformer/config.json; copy the folder again")
        if (own := family_of(self.network)) is not self.family:
            raise ValueError(
                f"pipeline={folder}: model_index.json describes {self.family.title}, transformer/config.json "
                f"{own.title}; copy the folder again"
            )
        self.cfg = self.family.settings(self.network)
        self.pipe = load_pipeline(self.folder, self.name, self.family, self.device, dtype, without)
        self.encoding = self.family.encoding(self.folder, self.pipe, self.cfg, self.from_image, self.device)
        self.encoding.check()
        self.vae, self.tiling = self.pipe.vae, tiling
        self.decoder: Any = self.vae  # the VAE that decodes
        self.tiny: TinyDecoder | None = None  # or what decodes in its place
        if tiling:
            self.vae.enable_tiling()

    @torch.no_grad()
    def clip(self, frames: NDArray, caption: str) -> dict[str, Tensor]:
        """Encode one clip, uint8 [F, H, W, 3], and its caption: latents and all condition fields."""
        video = pixels(frames).to(self.device)
        out = {"latents": self.latents(video), **self.text(caption, frames[0])}
        if self.from_image:
            out |= self.image(frames[0], len(frames))
        self.encoding.put_given(out)
        if bad := [key for key, value in out.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{self.folder}: encoded {bad[0]} is not finite; use dtype=float32, or check the weights")
        return {key: value.cpu() for key, value in out.items()}

    @torch.no_grad()
    def latents(self, video: Tensor) -> Tensor:
        """Encode a video [3, F, H, W] in [-1, 1] as normalised latents [C, f, h, w]."""
        z = self.vae.encode(video[None].to(self.vae.dtype)).latent_dist.mode()[0].float()
        shift, scale = self.encoding.normalisation()
        return (z - shift.to(z)) * scale.to(z)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents [C, f, h, w] to a video [3, F, H, W] in [-1, 1]."""
        z = latents.to(self.device, torch.float32)
        if self.tiny:
            return self.encoding.shown(self.tiny.decode(z[None])[0])
        shift, scale = self.encoding.normalisation()
        z = z / scale.to(z) + shift.to(z)
        return self.encoding.shown(self.decoder.decode(z[None].to(self.decoder.dtype), return_dict=False)[0][0])

    def decode_with(self, vae: str) -> None:
        """Decode with another VAE: the folder that stage=decoder wrote, or a file in TAEHV's layout."""
        if Path(vae).is_file():
            self.tiny = read_tiny(vae, self.family.geometry).to(self.device)
        else:
            self.decoder = read_vae(check_replaces(vae, self.folder, encodes=False)[0], self.device)

    @torch.no_grad()
    def text(self, prompt: str, first: NDArray | None = None) -> dict[str, Tensor]:
        """Encode a prompt: text [T, D] with zeros beyond text_len, text_len, and the family's other text fields."""
        return self.encoding.text(prompt, first)

    def null(self, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """Encode the null prompt; a text encoder that reads the first frame gets a black one of `size` (H, W)."""
        black = torch.zeros(*size, 3, dtype=torch.uint8).numpy()
        return {key: value.cpu() for key, value in self.text(prompt, black).items()}

    @torch.no_grad()
    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """Encode the first frame, uint8 [H, W, 3]: condition channels `image` [K, f, h, w], perhaps image_embeds."""
        return self.encoding.image(first, frames)

    def numbers(self, area: int, frames: int) -> tuple[int, int]:
        """Count the numbers of a cached clip of `area` pixels: (in latents and image conditions, in its text)."""
        geometry = self.family.geometry
        frame = area // geometry.pixel_stride**2
        clip = self.encoding.channels * geometry.latent_frames(frames) * frame + self.encoding.extra_numbers(frame)
        return clip, self.encoding.text_tokens * self.cfg.text_width

    def description(self) -> dict:
        """The description that a cache made with these encoders stores; training compares it with the network."""
        shift, scale = (x.flatten().tolist() for x in self.encoding.normalisation())
        text_parts = [p for p in ("text_encoder", "text_encoder_2") if (self.folder / p).is_dir()]
        return {
            "family": self.family.name,
            "pipeline": self.name,
            "image_condition": self.encoding.condition,
            "in_channels": self.network["in_channels"],
            "text_dim": self.cfg.text_width,
            "vae": component_id(self.folder / "vae"),
            "shift": shift,
            "scale": scale,
            "text_encoder": [component_id(self.folder / part) for part in text_parts],
            "image_encoder": component_id(self.folder / "image_encoder"),
            "text_tokens": self.encoding.text_tokens,
            "tiling": self.tiling,
        }


def load_pipeline(
    folder: Path, name: str, family: Family, device: torch.device, dtype: torch.dtype, without: Collection[str] = ()
) -> Any:
    """Load the stock pipeline from local safetensors files, without its network and without the parts in `without`."""
    diffusers = need_diffusers()
    for package, purpose in family.packages.items():
        if find_spec(package) is None:
            raise ValueError(f"{purpose}: pip install {package}")
    types = {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}
    absent = {part: None for part in ("transformer", "transformer_2", *without) if (folder / part).is_dir()}
    unread = (*absent, "lora", "lora_2", "original")
    verify_files(folder, lambda file: not file.startswith(tuple(f"{part}/" for part in unread)))
    try:
        with warnings.catch_warnings():  # newer versions of diffusers rename torch_dtype to dtype and warn
            warnings.simplefilter("ignore", FutureWarning)
            pipe = getattr(diffusers, name).from_pretrained(
                folder, torch_dtype=types, local_files_only=True, use_safetensors=True, **absent
            )
    except (OSError, ValueError, KeyError) as err:
        raise ValueError(f"pipeline={folder}: cannot be loaded ({' '.join(str(err).split())[:300]})") from None
    return pipe.to(device)


def read_config(folder: Path) -> dict:
    """Read config.json of a part of a pipeline; {} if that part is absent."""
    path = folder / "config.json"
    return read_json(path, record({}), "copy the folder again") if path.is_file() else {}


def component_id(folder: Path, blocks: int = 256, block: int = 1 << 16) -> str | None:
    """Hash a part's configuration and weights to 16 hexadecimal digits; None if the part is absent.

    To save time on large encoders, only the size of a weight file and `blocks` evenly spread pieces of `block` bytes
    enter the hash (16 MiB together); a smaller file enters completely.
    """
    if not folder.is_dir():
        return None
    config = {k: v for k, v in read_config(folder).items() if k not in ("_name_or_path", "_diffusers_version")}
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with opened(file) as f:
            sha.update(str(size).encode())
            for k in range(blocks):
                f.seek(k * block if size <= blocks * block else k * (size - block) // (blocks - 1))
                sha.update(f.read(block))
    return sha.hexdigest()[:16]
