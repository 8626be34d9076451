"""Videos, captions and first frames as a diffusers pipeline's own VAE, text and image encoders see them, and back.

Everything is done clip by clip, so that what comes out does not depend on what else was in the batch. Latents are the
mode of the VAE's posterior, not a draw: the same video always gives the same numbers. F frames, f latent frames.
"""

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """What a pipeline class fixes."""

    family: str
    image: bool  # image to video
    fps: float
    frames: int
    buckets: tuple[tuple[int, int], ...]
    text_tokens: int


LANDSCAPE_480, LANDSCAPE_720 = (480, 832), (720, 1280)
KINDS = {
    "WanPipeline": Kind("wan", False, 16, 81, (LANDSCAPE_480, LANDSCAPE_480[::-1]), 512),
    "WanImageToVideoPipeline": Kind("wan", True, 16, 81, (LANDSCAPE_480, LANDSCAPE_480[::-1]), 512),
    "HunyuanVideoPipeline": Kind("hunyuan", False, 24, 129, (LANDSCAPE_720, LANDSCAPE_720[::-1]), 256),
    "HunyuanVideoImageToVideoPipeline": Kind("hunyuan", True, 24, 129, (LANDSCAPE_720, LANDSCAPE_720[::-1]), 256),
}
STRIDE = 16  # pixels: 8 of the VAE times 2 of the network's patch
INTERLEAVE = {"latent_concat": 2, "token_replace": 4}  # every how many-th image token Hunyuan's text keeps


def kind_of(folder: str | Path) -> tuple[str, Kind]:
    """The pipeline class that model_index.json names, and what it fixes."""
    path = Path(folder) / "model_index.json"
    try:
        name = json.loads(path.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ValueError(f"pipeline={folder}: no diffusers pipeline folder ({type(err).__name__}: {err})") from None
    if name not in KINDS:
        raise ValueError(f"pipeline={folder}: is a {name}; wanted one of {', '.join(KINDS)}")
    return name, KINDS[name]


class Encoders:
    """The encoders of a pipeline folder; its network is not loaded. VAE and image encoder work in float32."""

    def __init__(
        self, folder: str | Path, device="cpu", dtype: torch.dtype = torch.float32, tiling: bool = False, without=()
    ):
        self.folder, self.device = Path(folder), torch.device(device)
        self.name, self.kind = kind_of(folder)
        self.network = read_config(self.folder / "transformer")
        if "in_channels" not in self.network:
            raise ValueError(f"pipeline={folder}: has no transformer/config.json; copy the folder again")
        self.pipe = load_pipeline(self.folder, self.name, self.device, dtype, without)
        self.vae, self.tiling = self.pipe.vae, tiling
        if tiling:
            self.vae.enable_tiling()
        self.condition = self.network.get("image_condition_type") if self.kind.family == "hunyuan" else None
        self.text_tokens = self.kind.text_tokens
        if self.condition:  # Llava's image tokens come first, and its pipeline cuts out 4 tokens of the template
            self.text_tokens += len(range(0, 576, INTERLEAVE[self.condition])) - 4

    @torch.no_grad()
    def clip(self, frames: NDArray, caption: str) -> dict[str, Tensor]:
        """All fields of one clip, from uint8 [F, H, W, 3]."""
        video = pixels(frames).to(self.device)
        out = {"latents": self.latents(video), **self.text(caption, frames[0])}
        if self.kind.image:
            out |= self.image(frames[0], len(frames))
        if self.condition == "token_replace":  # the network holds this frame at the image's own latent
            out["latents"][:, :1] = out["image"]
        if bad := [key for key, value in out.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{self.folder}: {bad[0]} came out not finite; use dtype=float32, or check the weights")
        return {key: value.cpu() for key, value in out.items()}

    @torch.no_grad()
    def latents(self, video: Tensor) -> Tensor:
        """Normalised latents [C, f, h, w] of a video [3, F, H, W] in [-1, 1]."""
        z = self.vae.encode(video[None].to(self.vae.dtype)).latent_dist.mode()[0].float()
        shift, scale = self.normalisation()
        return (z - shift.to(z)) * scale.to(z)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The video [3, F, H, W] in [-1, 1] of normalised latents [C, f, h, w]."""
        shift, scale = self.normalisation()
        z = latents.to(self.device, torch.float32)
        z = z / scale.to(z) + shift.to(z)
        video = self.vae.decode(z[None].to(self.vae.dtype), return_dict=False)[0][0]
        return video[:, 4:] if self.condition == "latent_concat" else video  # as its pipeline does

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), [C, 1, 1, 1]: normalised latents are (z - shift) * scale."""
        cfg = self.vae.config
        if self.kind.family == "wan":
            return wide(cfg.latents_mean), 1.0 / wide(cfg.latents_std)
        return wide([0.0]), wide([cfg.scaling_factor])

    @torch.no_grad()
    def text(self, prompt: str, first: NDArray | None = None) -> dict[str, Tensor]:
        """text [T, D] with zeros beyond text_len; Hunyuan also pooled, and for image to video it reads the frame."""
        if self.kind.family == "wan":
            text = self.pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens, device=self.device
            )[0][0]
            return {"text": text, "text_len": text.any(-1).sum()}  # the pipeline writes zeros after the last token
        seen = {"image": picture(first), "image_embed_interleave": INTERLEAVE[self.condition]} if self.condition else {}
        text, pooled, mask = self.pipe.encode_prompt(prompt=prompt, device=self.device, **seen)
        length = mask[0].sum().long()
        if not mask[0, :length].all() or length > self.text_tokens:
            raise ValueError(f"{self.folder}/tokenizer: does not pad at the end; set its padding_side to right")
        # what it crops can be a token more or less than its constants say where the prompt is empty or very long
        text = F.pad(text[0, :length], (0, 0, 0, self.text_tokens - int(length)))
        return {"text": text, "text_len": length, "pooled": pooled[0]}

    def null(self, prompt: str, size: tuple[int, int]) -> dict[str, Tensor]:
        """The text fields of the null prediction; Hunyuan's image to video shows it a black frame, as its pipeline."""
        black = torch.zeros(*size, 3, dtype=torch.uint8).numpy()
        return {key: value.cpu() for key, value in self.text(prompt, black).items()}

    @torch.no_grad()
    def image(self, first: NDArray, frames: int) -> dict[str, Tensor]:
        """The condition channels `image` [K, f, h, w] of a first frame uint8 [H, W, 3], and Wan's image_embeds."""
        still = pixels(first[None])[:, 0][None].to(self.device, self.vae.dtype)  # [1, 3, H, W]
        height, width = first.shape[:2]
        f, h, w = (frames - 1) // 4 + 1, height // 8, width // 8
        common = {"height": height, "width": width, "num_frames": frames, "dtype": torch.float32, "device": self.device}
        zeros = torch.zeros(1, 16, f, h, w)
        if self.kind.family == "wan":
            condition = self.pipe.prepare_latents(still, 1, 16, latents=zeros, **common)[1]
            out = {"image": condition[0]}
            if self.pipe.image_encoder is not None:
                out["image_embeds"] = self.pipe.encode_image(picture(first), self.device)[0]
            return out
        latents = self.pipe.prepare_latents(still, 1, 16, latents=zeros, image_condition_type=self.condition, **common)[
            1
        ]
        if self.condition == "token_replace":
            return {"image": latents[0]}  # one frame
        latents[:, :, 1:] = 0
        mask = torch.zeros_like(latents[:, :1])
        mask[:, :, 0] = 1
        return {"image": torch.cat([latents, mask], 1)[0]}

    @property
    def text_width(self) -> int:
        return self.network["text_dim" if self.kind.family == "wan" else "text_embed_dim"]

    def numbers(self, area: int, frames: int) -> tuple[int, int]:
        """How many numbers a clip of `area` pixels has: in latents, condition and image tokens; in its text."""
        frame, f = area // 64, (frames - 1) // 4 + 1
        clip = self.network["in_channels"] * f * frame + (16 * frame if self.condition == "token_replace" else 0)
        if self.name == "WanImageToVideoPipeline" and self.pipe.image_encoder is not None:
            vit = self.pipe.image_encoder.config
            clip += ((vit.image_size // vit.patch_size) ** 2 + 1) * vit.hidden_size
        return clip, self.text_tokens * self.text_width

    def description(self) -> dict:
        """What a cache made with these encoders says about itself."""
        shift, scale = (x.flatten().tolist() for x in self.normalisation())
        text = [p for p in ("text_encoder", "text_encoder_2") if (self.folder / p).is_dir()]
        return {
            "family": self.kind.family,
            "pipeline": self.name,
            "image_condition": self.condition or ("channels" if self.kind.image else None),
            "in_channels": self.network["in_channels"],
            "text_dim": self.text_width,
            "vae": component_id(self.folder / "vae"),
            "shift": shift,
            "scale": scale,
            "text_encoder": [component_id(self.folder / part) for part in text],
            "image_encoder": component_id(self.folder / "image_encoder") if self.kind.family == "wan" else None,
            "text_tokens": self.text_tokens,
            "tiling": self.tiling,
        }


def load_pipeline(folder: Path, name: str, device: torch.device, dtype: torch.dtype, without=()):
    """The stock pipeline without its network (and the parts `without`), from local safetensors only."""
    try:
        import diffusers
    except ImportError:
        raise ValueError("this needs diffusers and transformers: pip install 'fastlightgen[video]'") from None
    if name.startswith("Wan") and not diffusers.utils.is_ftfy_available():
        raise ValueError("Wan's pipelines clean prompts with ftfy: pip install ftfy")
    types = {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}
    absent = {part: None for part in ("transformer", "transformer_2", *without) if (folder / part).is_dir()}
    try:
        with warnings.catch_warnings():  # newer versions call it dtype, older ones know torch_dtype only
            warnings.simplefilter("ignore", FutureWarning)
            pipe = getattr(diffusers, name).from_pretrained(
                folder, torch_dtype=types, local_files_only=True, use_safetensors=True, **absent
            )
    except (OSError, ValueError, KeyError) as err:
        raise ValueError(f"pipeline={folder}: cannot be loaded ({' '.join(str(err).split())[:300]})") from None
    return pipe.to(device)


def pixels(frames: NDArray) -> Tensor:
    """uint8 [F, H, W, 3] -> float32 [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255 * 2 - 1


def picture(frame: NDArray):
    from PIL import Image

    return Image.fromarray(frame)


def wide(values: list[float]) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def read_config(folder: Path) -> dict:
    """config.json of a part of a pipeline; {} where that part is absent."""
    path = folder / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def component_id(folder: Path, blocks: int = 256, block: int = 1 << 16) -> str | None:
    """Short hash of a part's configuration and weights: of every file its size and up to 16 MiB, evenly spread."""
    if not folder.is_dir():
        return None
    config = {k: v for k, v in read_config(folder).items() if k not in ("_name_or_path", "_diffusers_version")}
    h = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as f:
            h.update(str(size).encode())
            for k in range(blocks):
                f.seek(k * block if size <= blocks * block else k * (size - block) // (blocks - 1))
                h.update(f.read(block))
    return h.hexdigest()[:16]
