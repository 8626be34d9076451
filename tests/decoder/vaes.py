"""Very small VAEs of diffusers' own classes with random weights, and a folder of short videos."""

from pathlib import Path

import numpy as np
import torch
from helpers import write_video

WAN = {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 4}
WAN |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
HUNYUAN = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 4}


def small_vae(family: str, seed: int = 0, **changes):
    """Norms and biases are random too, so that a wrong slice of them shows; frames stay inside of [-1, 1]."""
    import diffusers

    kind, config = {"wan": ("AutoencoderKLWan", WAN), "hunyuan": ("AutoencoderKLHunyuanVideo", HUNYUAN)}[family]
    torch.manual_seed(seed)
    vae = getattr(diffusers, kind)(**config | changes)
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if p.dim() == 1 or "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
        for p in (vae.decoder.conv_out if family == "wan" else vae.decoder.conv_out.conv).parameters():
            p.mul_(0.2)  # Wan's class clamps
    return vae.eval().requires_grad_(False)


WIDTHS, GROWTH = (12, 10, 6, 6), (1, 2, 2)  # of a tiny decoder


def tiny_weights(widths=WIDTHS, growth=GROWTH, channels=4, patch=1) -> dict[str, torch.Tensor]:
    """The tensors of a file in TAEHV's layout."""
    gen = torch.Generator().manual_seed(0)

    def conv(name, out, into, size=3, bias=True):
        made[f"{name}.weight"] = torch.randn(out, into, size, size, generator=gen) / (into * size * size) ** 0.5
        if bias:
            made[f"{name}.bias"] = 0.1 * torch.randn(out, generator=gen)

    made: dict[str, torch.Tensor] = {}
    conv("encoder.0", 3, 3)  # files hold the encoder too
    conv("decoder.1", widths[0], channels)
    for k, (first, width) in enumerate(zip((3, 9, 15), widths, strict=False)):
        for number in range(first, first + 3):
            conv(f"decoder.{number}.conv.0", width, 2 * width)
            conv(f"decoder.{number}.conv.2", width, width)
            conv(f"decoder.{number}.conv.4", width, width)
        conv(f"decoder.{first + 4}.conv", width * growth[k], width, 1, bias=False)
        conv(f"decoder.{first + 5}", widths[k + 1], width, bias=False)
    conv("decoder.22", 3 * patch**2, widths[3])
    return made


def write_videos(folder: Path, count: int = 2) -> Path:
    """Videos of 24 frames: smooth noise that moves."""
    folder.mkdir(parents=True)
    for k in range(count):
        noise = np.random.default_rng(k).integers(0, 255, (8, 10, 3))
        still = np.kron(noise, np.ones((8, 8, 1)))  # 64 x 80
        film = np.stack([np.roll(still, 2 * f, 1) for f in range(24)]).astype(np.uint8)
        write_video(folder / f"{k}.mp4", film, 16)
    return folder
