"""Tiny decoders in the layout of TAEHV (taehv.pth, taew2_1.pth, ...), which users have on disk: weights and decoding.

A TAEHV decoder maps latents as the network has them, normalised, to RGB in [0, 1], and is causal in time. Its layers:

    0          t(z) = 3 tanh(z / 3)
    1, 2       convolution, ReLU
    3 to 20    three times: three memory blocks, a picture twice as large, `grow`, a convolution
    21, 22     ReLU, convolution; then pixel shuffle

A memory block computes ReLU(c3 ReLU(c2 ReLU(c1 [x_n, x_(n-1)])) + s x_n) from a frame and the one before, or zeros.
`grow`, a 1 x 1 convolution, makes one or two frames of each. The first frames, one fewer than a latent frame makes, go.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.models.folder.files import read_tensors
from fastlightgen.models.geometry import Geometry

STAGES = ((3, 4, 5), (9, 10, 11), (15, 16, 17))  # memory blocks; `grow` comes 2 layers after the last, its
LAST = 22  # convolution 3 after


class TinyDecoder:
    """Decodes normalised latents [B, C, f, h, w] to frames [B, 3, F, H, W] in [-1, 1]."""

    def __init__(self, weights: dict[str, Tensor]):
        """`weights`: the tensors decoder.N... of the file, in float32."""
        self.weights = weights
        self.channels = weights["decoder.1.weight"].shape[1]
        self.growth = [len(weights[f"decoder.{stage[-1] + 2}.conv.weight"]) // self.width(stage) for stage in STAGES]
        self.patch = math.isqrt(len(weights[f"decoder.{LAST}.weight"]) // 3)

    def width(self, stage: tuple[int, ...]) -> int:
        return len(self.weights[f"decoder.{stage[0]}.conv.4.weight"])

    def to(self, device: torch.device | str) -> "TinyDecoder":
        return TinyDecoder({key: value.to(device) for key, value in self.weights.items()})

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, self.weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def memory_block(self, name: str, x: Tensor, frames: int) -> Tensor:
        """Pictures x [B frames, C, H, W], clip after clip."""
        clips = x.unflatten(0, (-1, frames))
        before = torch.cat([torch.zeros_like(clips[:, :1]), clips[:, :-1]], 1).flatten(0, 1)
        h = F.relu(self.conv(f"{name}.conv.0", torch.cat([x, before], 1)))
        h = self.conv(f"{name}.conv.4", F.relu(self.conv(f"{name}.conv.2", h)))
        return F.relu(h + (self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.weights else x))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        z = latents.float()
        frames = z.shape[2]
        x = F.relu(self.conv("decoder.1", 3 * torch.tanh(z.transpose(1, 2).flatten(0, 1) / 3)))
        for stage, growth in zip(STAGES, self.growth, strict=True):
            for number in stage:
                x = self.memory_block(f"decoder.{number}", x, frames)
            # `grow` works on every pixel by itself: before the enlargement it costs a quarter.
            x = self.conv(f"decoder.{stage[-1] + 2}.conv", x).unflatten(1, (growth, -1)).flatten(0, 1)
            frames *= growth
            x = self.conv(f"decoder.{stage[-1] + 3}", F.interpolate(x, scale_factor=2))
        x = F.pixel_shuffle(self.conv(f"decoder.{LAST}", F.relu(x)), self.patch)
        video = x.unflatten(0, (-1, frames)).transpose(1, 2)
        return video[:, :, math.prod(self.growth) - 1 :].clamp(0, 1) * 2 - 1


def read_tiny(file: str | Path, geometry: Geometry) -> TinyDecoder:
    """Read a file in TAEHV's layout, .safetensors or a pickle of plain tensors; checks every name and shape.

    `geometry`: the latents that it must decode.
    """
    held = {k: v for k, v in read_tensors([Path(file)]).items() if k.startswith("decoder.")}
    into = width(held, file, "decoder.1.weight")
    wanted: dict[str, tuple[int, ...]] = {"decoder.1.weight": (into, -1, 3, 3), "decoder.1.bias": (into,)}
    for stage in STAGES:
        for number in stage:
            name, out = f"decoder.{number}", width(held, file, f"decoder.{number}.conv.4.weight")
            for layer, size in (("0", 2 * into), ("2", out), ("4", out)):
                wanted |= {f"{name}.conv.{layer}.weight": (out, size, 3, 3), f"{name}.conv.{layer}.bias": (out,)}
            if into != out:
                wanted[f"{name}.skip.weight"] = (out, into, 1, 1)
            into = out
        grow, conv = f"decoder.{stage[-1] + 2}.conv.weight", f"decoder.{stage[-1] + 3}.weight"
        wanted[grow] = (width(held, file, grow), into, 1, 1)
        if wanted[grow][0] not in (into, 2 * into):
            raise ValueError(f"vae={file}: {grow} makes {wanted[grow][0]} channels, wanted {into} or {2 * into}")
        wanted[conv] = (width(held, file, conv), into, 3, 3)
        into = wanted[conv][0]
    last = width(held, file, f"decoder.{LAST}.weight")
    wanted |= {f"decoder.{LAST}.weight": (last, into, 3, 3), f"decoder.{LAST}.bias": (last,)}
    if last not in (3, 12, 48):
        raise ValueError(f"vae={file}: decoder.{LAST} makes {last} channels, wanted 3 x 1, 4 or 16 pixels of a patch")
    for key, shape in wanted.items():
        got = list(held[key].shape) if key in held else "missing"
        if key not in held or len(got) != len(shape) or any(w not in (-1, g) for g, w in zip(got, shape, strict=True)):
            raise ValueError(f"vae={file}: {key} is {got}, wanted {list(shape)}; give a file in TAEHV's layout")
    if extra := sorted(held.keys() - wanted.keys()):
        raise ValueError(f"vae={file}: holds {extra[0]}, which TAEHV's layout has not; give a file in that layout")
    tiny = TinyDecoder({key: value.float() for key, value in held.items()})
    made = (tiny.channels, math.prod(tiny.growth), 8 * tiny.patch)
    if made != (wants := (geometry.channels, geometry.frame_stride, geometry.pixel_stride)):
        raise ValueError(
            f"vae={file}: decodes latents of {made[0]} channels, {made[1]} frames and {made[2]} pixels, and the "
            f"pipeline has {wants[0]}, {wants[1]} and {wants[2]}; give a decoder of this family"
        )
    return tiny


def width(held: dict[str, Tensor], file: str | Path, key: str) -> int:
    """The output channels of a layer."""
    if key not in held:
        raise ValueError(f"vae={file}: has no {key}; give a file in TAEHV's layout")
    return len(held[key])
