"""stage=decoder: prune the decoder of a pipeline's VAE and fine-tune it on real videos (VDMini, appendix A).

The VAE's own encoder, frozen, makes the latents z of a clip x; y is what the small decoder makes of z:

    L = a |y - x| + b LPIPS(y, x) + c softplus(-D(y)),        a = 1, b = 1, c = 0.2 in the paper
    L_D = softplus(-D(x)) + softplus(D(y))

Shapes: x, y [B, 3, F, H, W] in [-1, 1]; z [B, C, f, h, w].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlightgen.config import Checked, ConfigError, field, parse_buckets
from fastlightgen.config.fields import REQUIRED
from fastlightgen.config.limits import MOST_CLIPS, MOST_FPS, MOST_FRAMES, MOST_WORKERS
from fastlightgen.config.training import SCHEDULE
from fastlightgen.decoder.clips import Clips, video_rows
from fastlightgen.decoder.folder import CARD, read_vae, read_vae_card, read_vae_config, write_vae
from fastlightgen.decoder.layout import KINDS
from fastlightgen.decoder.losses import Discriminator, Perceptual, psnr, read_perceptual, reconstruction_loss
from fastlightgen.decoder.prune import compress
from fastlightgen.engine.roles import Role, Update
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.constant import constant
from fastlightgen.parallel.log import count, say
from fastlightgen.pipelines.encoders import component_id
from fastlightgen.pipelines.origin import name_of
from fastlightgen.rng import generator, rows
from fastlightgen.stages.adversarial import pushed
from fastlightgen.stages.discriminator import discriminator_loss, generator_loss

WEIGHTS = 1  # the purpose of the discriminator's first weights among the random draws; 0 is that of the clips


@dataclass(kw_only=True)
class DecoderKeys(Checked):
    """Keys of stage=decoder."""

    vae: str = field(REQUIRED, "folder of a VAE, or of the pipeline that holds it", everyday=True)
    videos: str = field(REQUIRED, "a .csv or .jsonl list of clips, or a folder of videos", everyday=True)
    keep_channels: float = field(0.5, "share of the channels that stay in every layer", above=0, hi=1, everyday=True)
    drop_layers: int = field(
        0, "residual blocks that every level loses; the result then has no encoder", lo=0, hi=1_000, everyday=True
    )
    score: str = field(
        "taylor",
        "what chooses the channels; taylor: the change of the error without a channel, to first order; norm: the size "
        "of its weights",
        choices=("taylor", "norm"),
    )
    score_clips: int = field(8, "clips that choose residual blocks and channels", lo=1, hi=MOST_CLIPS)
    size: str = field("256x256", "HEIGHTxWIDTH that clips are cropped to", everyday=True)
    frames: int = field(17, "frames per clip, 4 k + 1", lo=1, hi=MOST_FRAMES, everyday=True)
    fps: float = field(0.0, "frames per second; 0: the VAE's own, 16 for Wan, 24 for HunyuanVideo", lo=0, hi=MOST_FPS)
    batch: int = field(8, "clips per step", lo=1, hi=MOST_CLIPS, everyday=True)
    iters: int = field(15000, "optimizer steps", lo=1, everyday=True)
    lr: float = field(5e-5, "learning rate of the decoder", lo=0, everyday=True)
    betas: list[float] = field([0.9, 0.999], "AdamW's two decay rates", lo=0, below=1)
    weight_decay: float = field(0.0, "AdamW's weight decay", lo=0)
    clip: float = field(1.0, "largest gradient norm", above=0)
    warmup: int = field(100, "steps over which the learning rate rises from 0", lo=0)
    lr_schedule: str = field("cosine", SCHEDULE, choices=("constant", "cosine"))
    reconstruction: float = field(1.0, "weight of the mean absolute error", lo=0)
    perceptual: str = field(
        "", "file with VGG16's weights (torchvision's keys) for the perceptual term; empty: no such term", everyday=True
    )
    perceptual_heads: str = field("", "file with the weights that LPIPS has learnt for VGG16; empty: equal ones")
    perceptual_weight: float = field(1.0, "weight of the perceptual term", lo=0)
    adversarial: float = field(0.2, "weight of the adversarial term; 0: no discriminator", lo=0, everyday=True)
    adversarial_start: float = field(0.2, "share of the steps before the adversarial term sets in", lo=0, hi=1)
    adversarial_lr: float = field(1e-4, "learning rate of the discriminator", lo=0)
    adversarial_width: int = field(32, "channels of the discriminator's first layer", lo=1, hi=10_000)
    workers: int = field(2, "threads that read clips ahead; 0: none", lo=0, hi=MOST_WORKERS, numbers=False)

    def check(self) -> None:
        super().check()
        self.check_ordered("betas")
        if len(parse_buckets(self.size)) != 1:
            raise ConfigError(f"size={self.size}: wanted one size, for example 256x256")
        if self.perceptual_heads and not self.perceptual:
            raise ConfigError(f"perceptual_heads={self.perceptual_heads}: has no effect without perceptual=FILE")

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of a clip."""
        return parse_buckets(self.size)[0]


class Decoder:
    """The fine-tuning for the loop: the small decoder and its discriminator."""

    number: int | str = "decoder"
    drifts = False
    frozen: Sequence[VideoDiT] = ()
    teacher: VideoDiT | None = None  # the target is the data

    def __init__(
        self,
        cfg: Any,
        vae: Any,
        small: Any,
        batches: Callable[[int], Tensor],
        card: dict[str, Any],
        perceptual: Perceptual | None = None,
    ):
        """`vae` encodes and is not trained, `small` has the decoder in training; both have the device of the run."""
        self.cfg, self.vae, self.small, self.batches, self.card = cfg, vae, small, batches, card
        self.perceptual, self.iters = perceptual, cfg.iters
        self.device = next(vae.parameters()).device
        role = partial(
            Role,
            betas=cfg.betas,
            weight_decay=cfg.weight_decay,
            clip=cfg.clip,
            warmup=cfg.warmup,
            cosine=cfg.lr_schedule == "cosine",
        )
        small.decoder.requires_grad_(True)
        self.roles = {"decoder": role(small.decoder, cfg.lr)}
        self.judge: Discriminator | None = None
        if cfg.adversarial:
            self.judge = Discriminator(cfg.adversarial_width, generator(cfg.seed, WEIGHTS))
            self.roles["discriminator"] = role(self.judge, cfg.adversarial_lr)
        self.loss_key = "reconstruction" if self.judge is None else "decoder_reconstruction"
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # first clip of a share -> (real, decoded), of this step

    def begin(self) -> None:
        """Nothing to measure before training."""

    def adversarial(self, step: int) -> bool:
        """Whether the step has the adversarial term."""
        return self.judge is not None and step >= self.cfg.adversarial_start * self.iters

    def updates(self, step: int) -> list[Update]:
        out = [Update("decoder", lambda: self.decoder_loss(step))]
        return out + [Update("discriminator", self.discriminator_loss)] * self.adversarial(step)

    def decoded(self, step: int) -> tuple[Tensor, Tensor]:
        """The clips of a step and what the small decoder makes of their latents."""
        x = self.batches(step).to(self.device)
        with torch.no_grad():
            z = self.vae.encode(x).latent_dist.mode().float()
        return x, self.small.decode(z).sample.float()

    def decoder_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        cfg, (x, y) = self.cfg, self.decoded(step)
        term = reconstruction_loss(y, x)
        loss, record = cfg.reconstruction * term, {"reconstruction": term.item(), "psnr": psnr(y.detach(), x).item()}
        if self.perceptual:
            term = self.perceptual(y, x)
            loss, record["perceptual"] = loss + cfg.perceptual_weight * term, term.item()
        if self.adversarial(step):
            assert self.judge is not None
            with constant(self.judge):  # its weights belong to another optimizer
                seen = y.detach().requires_grad_(True)
                term = generator_loss(self.judge(seen).float())
                (gradient,) = torch.autograd.grad(term, seen)
            loss, record["adversarial"] = loss + cfg.adversarial * pushed(y, term.detach(), gradient), term.item()
            self.made[rows(cfg.batch)[0]] = x, y.detach()
        return loss, record

    def discriminator_loss(self) -> tuple[Tensor, dict[str, float]]:
        assert self.judge is not None
        x, y = self.made.pop(rows(self.cfg.batch)[0])
        real, decoded = (self.judge(v).float() for v in (x, y))
        record = {"real": torch.sigmoid(real).mean().item(), "decoded": torch.sigmoid(decoded).mean().item()}
        return discriminator_loss(real, decoded), record

    def check(self, step: int) -> None:
        """Nothing can drift here: the target is the data."""

    def sampler(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path, write: Callable[..., Any] | None = None) -> None:
        """Write the VAE with the fine-tuned decoder; `write`, for networks with a walk, is not used."""
        write_vae(self.small, folder, self.card | {"steps": self.iters})


def build(cfg: Any, folder: Path, device: torch.device) -> Decoder:
    """Prune the decoder, or read the one that an earlier start has left in `folder`, and make the stage."""
    config = check_clips(cfg)
    kind = KINDS[config["_class_name"]]
    videos = video_rows(cfg.videos)
    perceptual = read_perceptual(cfg.perceptual, cfg.perceptual_heads).to(device) if cfg.perceptual else None
    vae = read_vae(cfg.vae, device)
    batches = Clips(videos, cfg.fps or kind.fps, cfg.frames, cfg.pixels, cfg.batch, cfg.iters, cfg.seed, cfg.workers)
    done, wanted = folder / "pruned", pruning(cfg)
    if not (done / CARD).is_file() or (card := read_vae_card(done))["pruning"] != wanted:
        say(f"stage decoder: chooses channels with {cfg.score_clips} clips")
        small, record = compress(
            vae, pairs(vae, batches, cfg.score_clips), cfg.keep_channels, cfg.drop_layers, cfg.score
        )
        card = {"stage": "decoder", "source": name_of(cfg.vae), "pruning": wanted, **record}
        write_vae(small, done, card)
    small = read_vae(done, device)  # every start reads it, so that all train the same numbers
    left, parts = card["channels"]
    before, after = card["parameters"]
    say(f"stage decoder: keeps {left} of {parts} parts of the channels, {count(after)} of {count(before)} parameters")
    if not card["encoder"]:
        say("stage decoder: the result has no encoder, because its class has one size for both halves")
    vae.decoder = None  # only its encoder is needed from here on
    return Decoder(cfg, vae, small, batches, card, perceptual)


def check_clips(cfg: Any) -> dict[str, Any]:
    """Check the sizes of the clips against the VAE's configuration, and return it."""
    _, config = read_vae_config(cfg.vae)
    kind = KINDS[config["_class_name"]]
    temporal, spatial = config.get(kind.temporal, 4), config.get(kind.spatial, 8)
    if (cfg.frames - 1) % temporal:
        raise ConfigError(f"frames={cfg.frames}: wanted {temporal} k + 1, for example {temporal * 4 + 1}")
    if any(n % spatial for n in cfg.pixels):
        raise ConfigError(f"size={cfg.size}: wanted multiples of {spatial}, for example 256x256")
    return config


def pruning(cfg: Any) -> dict[str, Any]:
    """What the pruned decoder depends on, as JSON holds it."""
    keys = ("keep_channels", "drop_layers", "score", "score_clips", "size", "frames", "fps", "seed", "videos")
    return {"vae": inputs(cfg)["vae_id"]} | {key: getattr(cfg, key) for key in keys}


def inputs(cfg: Any) -> dict[str, Any]:
    """What the result depends on beside the configuration: the content of the VAE."""
    return {"vae_id": component_id(read_vae_config(cfg.vae)[0])}


@torch.no_grad()
def pairs(vae: Any, batches: Clips, clips: int) -> list[tuple[Tensor, Tensor]]:
    """Latents and frames of clips that training does not draw."""
    out = []
    for number in range(clips):
        x = batches.draw(-1 - number)[None].to(next(vae.parameters()).device)
        out.append((vae.encode(x).latent_dist.mode(), x))
    return out


@dataclass(frozen=True)
class DecoderMethod:
    """The part of a method's record that the configuration reads; this stage has no walks to plan."""

    stage: str = "decoder"
    name: str = "fastlightgen"
    about: str = "prune the decoder of a VAE and fine-tune it"
    keys: type[Checked] = DecoderKeys


METHOD = DecoderMethod()
