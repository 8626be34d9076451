"""Tiny decoders against a decoder written from the description of TAEHV's layout, frame by frame."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from vaes import GROWTH
from vaes import tiny_weights as weights

from fastlightgen.decoder.taehv import read_tiny
from fastlightgen.models.geometry import Geometry

GEOMETRY = Geometry(channels=4, frame_stride=4, pixel_stride=8, patch=2)


class Reference:
    """One latent frame after the other; every memory block remembers its last input."""

    def __init__(self, w: dict[str, torch.Tensor], growth):
        self.w, self.growth, self.memory = {k: v.double() for k, v in w.items()}, growth, {}

    def conv(self, name, x):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def block(self, number, x):
        past = self.memory.get(number, torch.zeros_like(x))
        self.memory[number] = x
        h = self.conv(f"decoder.{number}.conv.0", torch.cat([x, past])[None])
        h = self.conv(f"decoder.{number}.conv.4", F.relu(self.conv(f"decoder.{number}.conv.2", F.relu(h))))
        return F.relu(h[0] + x)

    def frame(self, z):
        frames = [F.relu(self.conv("decoder.1", (3 * torch.tanh(z / 3))[None])[0])]
        for k, first in enumerate((3, 9, 15)):
            out = []
            for x in frames:
                for number in range(first, first + 3):
                    x = self.block(number, x)
                x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)  # nearest, as nn.Upsample
                grown = self.conv(f"decoder.{first + 4}.conv", x[None])[0]
                out += [self.conv(f"decoder.{first + 5}", part[None])[0] for part in grown.chunk(self.growth[k])]
            frames = out
        return [self.conv("decoder.22", F.relu(x)[None])[0] for x in frames]

    def decode(self, z):
        """[C, f, h, w] -> [3, F, H, W] in [-1, 1]."""
        frames = [frame for n in range(z.shape[1]) for frame in self.frame(z[:, n])]
        return torch.stack(frames[3:], 1).clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_equals_the_description(tmp_path, suffix):
    file, z = tmp_path / f"tiny{suffix}", 2 * torch.randn(2, 4, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    made = weights()
    save_file(made, file) if suffix == ".safetensors" else torch.save(made, file)
    got = read_tiny(file, GEOMETRY).decode(z)
    assert got.shape == (2, 3, 9, 16, 24)
    wanted = torch.stack([Reference(made, GROWTH).decode(clip.double()) for clip in z])
    assert wanted.std() > 0.1 and (wanted.abs() < 1).float().mean() > 0.2  # not all of it is clamped
    assert (got - wanted).abs().max() < 1e-5


def test_patches_are_shuffled(tmp_path):
    """Wan 2.2's file has patches of 2: channel c 4 + 2 i + j of the last layer is pixel (i, j) of colour c."""
    save_file(weights(patch=2), tmp_path / "tiny.safetensors")
    geometry = Geometry(channels=4, frame_stride=4, pixel_stride=16, patch=2)
    z = torch.randn(1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    got = read_tiny(tmp_path / "tiny.safetensors", geometry).decode(z)[0, :, 0]
    last = Reference(weights(patch=2), GROWTH).frame(z[0, :, 0].double())[3]
    for c, i, j in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        wanted = last[4 * c + 2 * i + j].clamp(0, 1) * 2 - 1
        assert (got[c, i::2, j::2] - wanted).abs().max() < 1e-5


def other(**changes):
    return {k: v for k, v in (weights() | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"a": torch.zeros(1)}, "has no decoder.1.weight; give a file in TAEHV's layout"),
        (other(**{"decoder.16.conv.2.bias": None}), "decoder.16.conv.2.bias is missing"),
        (
            other(**{"decoder.9.conv.0.weight": torch.zeros(10, 10, 3, 3)}),
            r"is \[10, 10, 3, 3\], wanted \[10, 20, 3, 3\]",
        ),
        (other(**{"decoder.30.weight": torch.zeros(1)}), "holds decoder.30.weight, which TAEHV's layout has not"),
        (
            weights(channels=16),
            "of 16 channels, 4 frames and 8 pixels, and the pipeline has 4, 4 and 8",
        ),
        (weights(growth=(2, 2, 2)), "of 4 channels, 8 frames and 8 pixels"),
    ],
)
def test_files_that_do_not_fit(tmp_path, made, message):
    file = tmp_path / "tiny.safetensors"
    save_file(made, file)
    with pytest.raises(ValueError, match=message) as raised:
        read_tiny(file, GEOMETRY)
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_truncated(tmp_path):
    file = tmp_path / "tiny.safetensors"
    save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_tiny(file, GEOMETRY)
