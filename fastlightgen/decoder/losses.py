"""The losses of the decoder's fine-tuning, and the networks that two of them need.

Shapes: videos x (real) and y (decoded) [B, 3, F, H, W] in [-1, 1]; pictures [N, 3, H, W].
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlightgen.models.folder.files import read_tensors

# VGG16 up to relu5_3: the numbers of its convolutions in torchvision's `features`, per stage between two poolings.
VGG = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
MEAN, DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS's, of pictures in [-1, 1]
SMALL = 1e-10  # keeps the norm of a feature vector away from 0, as in LPIPS


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """mean |y - x|."""
    return (y - x).abs().mean()


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB; the range of the pixels is 2."""
    return 10 * torch.log10(4 / (y - x).square().mean())


class Perceptual(nn.Module):
    """LPIPS (arXiv 1801.03924, Eq. 1) with VGG16, for every frame of a video by itself.

    d = sum over stages of the mean over places of w_l . (f_l(y) - f_l(x))^2, with features f_l of unit length.
    """

    def __init__(self, weights: dict[str, Tensor]):
        """`weights`: features.N.weight and .bias as in torchvision; optionally LPIPS's w_l, linL.model.1.weight.

        Without w_l every channel has the weight 1 / number of channels.
        """
        super().__init__()
        for key, value in weights.items():
            self.register_buffer(key.replace(".", "_"), value.float())
        self.heads = "lin0.model.1.weight" in weights

    def features(self, x: Tensor) -> list[Tensor]:
        """The outputs of the five stages for pictures [N, 3, H, W]."""
        shift, scale = (x.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        h, out = (x - shift) / scale, []
        for number, stage in enumerate(VGG):
            h = F.max_pool2d(h, 2) if number else h
            for conv in stage:
                weight, bias = (self.get_buffer(f"features_{conv}_{part}") for part in ("weight", "bias"))
                h = F.relu(F.conv2d(h, weight, bias, padding=1))
            out.append(h)
        return out

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """The mean distance of the frames of two videos."""
        y, x = (v.transpose(1, 2).flatten(0, 1) for v in (y, x))
        with torch.no_grad():
            wanted = self.features(x)
        total = y.new_zeros(())
        for number, (a, b) in enumerate(zip(self.features(y), wanted, strict=True)):
            difference = (unit(a) - unit(b)).square()
            if self.heads:
                head = self.get_buffer(f"lin{number}_model_1_weight").view(1, -1, 1, 1)
                total = total + (difference * head).sum(1).mean()
            else:
                total = total + difference.mean()
        return total


def unit(f: Tensor) -> Tensor:
    """Features [N, C, H, W] divided by their length over C."""
    return f / (f.square().sum(1, keepdim=True).sqrt() + SMALL)


def read_perceptual(file: str, heads: str = "") -> Perceptual:
    """Read VGG16's weights (torchvision's keys) and, if given, LPIPS's file of w_l; checks names and shapes."""
    held = read_tensors([Path(file)]) | (read_tensors([Path(heads)]) if heads else {})
    wanted: dict[str, tuple[int, ...]] = {}
    into, out = 3, 0
    for number, stage in enumerate(VGG):
        for conv in stage:
            weight = held.get(f"features.{conv}.weight")
            out = len(weight) if weight is not None and weight.dim() == 4 else 0
            wanted |= {f"features.{conv}.weight": (out, into, 3, 3), f"features.{conv}.bias": (out,)}
            into = out
        if heads or "lin0.model.1.weight" in held:
            wanted[f"lin{number}.model.1.weight"] = (1, out, 1, 1)
    for key, shape in wanted.items():
        got = list(held[key].shape) if key in held else "missing"
        if got != list(shape) or not shape[0]:
            where = f"perceptual_heads={heads}" if heads and key.startswith("lin") else f"perceptual={file}"
            raise ValueError(f"{where}: {key} is {got}, wanted {list(shape)}; give VGG16 with torchvision's keys")
    return Perceptual({key: held[key] for key in wanted})


class Discriminator(nn.Module):
    """Patches of a video, real or decoded: a logit per patch (pix2pix's, arXiv 1611.07004, in three dimensions)."""

    def __init__(self, width: int, gen: torch.Generator):
        super().__init__()
        plan = ((3, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 1, 1))
        layers: list[nn.Module] = []
        for number, (into, out, stride) in enumerate(plan):
            conv = nn.Conv3d(into, out, (3, 4, 4), (1, stride, stride), (1, 1, 1))
            with torch.no_grad():  # from `gen` alone, so that every start of a run draws the same
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=gen) / conv.weight[0].numel() ** 0.5)
                nn.init.zeros_(conv.get_parameter("bias"))
            last = number == len(plan) - 1
            layers += [conv] if last else [conv, nn.GroupNorm(1, out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
