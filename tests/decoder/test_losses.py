"""The losses against float64 formulas, and weights of the perceptual term that do not fit."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastlightgen.decoder.losses import DEVIATION, MEAN, VGG, Discriminator, psnr, read_perceptual, reconstruction_loss

WIDTHS = (4, 5, 6, 7, 8)


def vgg(seed: int = 0) -> dict[str, torch.Tensor]:
    """VGG16 with few channels."""
    gen, into, out = torch.Generator().manual_seed(seed), 3, {}
    for width, stage in zip(WIDTHS, VGG, strict=True):
        for conv in stage:
            out[f"features.{conv}.weight"] = torch.randn(width, into, 3, 3, generator=gen) / (9 * into) ** 0.5
            out[f"features.{conv}.bias"] = 0.1 * torch.randn(width, generator=gen)
            into = width
    return out


def heads() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(5)
    return {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1, generator=gen) for k, w in enumerate(WIDTHS)}


def videos(seed: int = 1):
    gen = torch.Generator().manual_seed(seed)
    return [(2 * torch.rand(2, 3, 3, 16, 24, generator=gen) - 1).double() for _ in range(2)]


def test_reconstruction_and_psnr():
    y, x = videos()
    difference = (y - x).numpy()
    assert reconstruction_loss(y, x).item() == pytest.approx(np.mean(np.abs(difference)), rel=1e-12)
    wanted = 20 * math.log10(2) - 10 * math.log10(np.mean(difference**2))
    assert psnr(y, x).item() == pytest.approx(wanted, rel=1e-12)


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[C, H, W] by a 3 x 3 kernel, with zeros around it."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    h, w = x.shape[1:]
    taps = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.einsum("tchw,oct->ohw", np.stack(taps), weight.reshape(*weight.shape[:2], 9)) + bias[:, None, None]


def lpips(a: np.ndarray, b: np.ndarray, weights: dict, lin: dict) -> float:
    """LPIPS of two pictures [3, H, W], written out."""
    hidden, total = [], 0.0
    for picture in (a, b):
        hidden.append((picture - np.array(MEAN)[:, None, None]) / np.array(DEVIATION)[:, None, None])
    for k, stage in enumerate(VGG):
        if k:
            hidden = [h.reshape(len(h), h.shape[1] // 2, 2, h.shape[2] // 2, 2).max((2, 4)) for h in hidden]
        for conv in stage:
            w, bias = (weights[f"features.{conv}.{part}"].double().numpy() for part in ("weight", "bias"))
            hidden = [np.maximum(convolved(h, w, bias), 0) for h in hidden]
        units = [h / (np.sqrt((h**2).sum(0)) + 1e-10) for h in hidden]
        head = lin[f"lin{k}.model.1.weight"].double().numpy().reshape(-1, 1, 1) if lin else 1 / len(units[0])
        total += ((units[0] - units[1]) ** 2 * head).sum(0).mean()
    return total


@pytest.mark.parametrize("with_heads", [False, True])
def test_perceptual(tmp_path, with_heads):
    save_file(vgg(), tmp_path / "vgg.safetensors")
    torch.save(heads(), tmp_path / "lin.pth")
    term = read_perceptual(str(tmp_path / "vgg.safetensors"), str(tmp_path / "lin.pth") if with_heads else "").double()
    y, x = videos()
    y, x = y[..., :16, :16], x[..., :16, :16]
    frames = [(y[b, :, f].numpy(), x[b, :, f].numpy()) for b in range(2) for f in range(3)]
    wanted = np.mean([lpips(*pair, vgg(), heads() if with_heads else {}) for pair in frames])
    assert wanted > 0.01
    assert term(y, x).item() == pytest.approx(wanted, rel=1e-6)  # the weights are stored in float32
    assert not list(term.parameters())  # nothing of it is trained
    seen = y.clone().requires_grad_(True)
    term(seen, x).backward()
    step = torch.zeros_like(y)
    step[0, 1, 2, 5, 6] = 1e-6
    slope = (term(y + step, x) - term(y - step, x)).item() / 2e-6
    assert seen.grad[0, 1, 2, 5, 6].item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.5.weight": torch.zeros(5, 3, 3, 3)}, r"features.5.weight is \[5, 3, 3, 3\], wanted \[5, 4, 3, 3\]"),
        ({"features.28.bias": torch.zeros(3)}, r"features.28.bias is \[3\], wanted \[8\]"),
        ({"features.14.weight": None}, "features.14.weight is missing"),
        ({"lin0.model.1.weight": torch.zeros(1, 9, 1, 1)}, r"lin0.model.1.weight is \[1, 9, 1, 1\], wanted \[1, 4"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    file = tmp_path / "vgg.safetensors"
    save_file({k: v for k, v in (vgg() | change).items() if v is not None}, file)
    with pytest.raises(ValueError, match=message) as raised:
        read_perceptual(str(file))
    assert str(raised.value).startswith(f"perceptual={file}") and "\n" not in str(raised.value)


def test_discriminator_sees_patches():
    """One logit per 8 x 8 pixels or so and frame; the same generator gives the same weights."""
    net, twin = (Discriminator(4, torch.Generator().manual_seed(3)) for _ in range(2))
    x = videos()[0].float()
    x = torch.cat([x, x], 3)
    logits = net(x)
    assert logits.shape == (2, 1, 3, 3, 2) and torch.equal(logits, twin(x))
