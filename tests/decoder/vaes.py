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


def write_videos(folder: Path, count: int = 2) -> Path:
    """Videos of 24 frames: smooth noise that moves."""
    folder.mkdir(parents=True)
    for k in range(count):
        noise = np.random.default_rng(k).integers(0, 255, (8, 10, 3))
        still = np.kron(noise, np.ones((8, 8, 1)))  # 64 x 80
        film = np.stack([np.roll(still, 2 * f, 1) for f in range(24)]).astype(np.uint8)
        write_video(folder / f"{k}.mp4", film, 16)
    return folder
