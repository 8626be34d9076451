"""I3D: its padding and its layers against loops in float64, its table of tensors, and what is refused."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastlightgen.metrics import i3d
from fastlightgen.metrics.network import Network

CPU = torch.device("cpu")


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a size that keeps the activations alive."""
    draw, out = torch.Generator().manual_seed(seed), {}
    for name, shape in i3d.tensors().items():
        x = torch.randn(shape, generator=draw)
        if name.endswith(("running_var", "bn.weight")):
            x = 0.5 + x.abs()
        elif name.endswith("conv3d.weight"):
            x = x * math.sqrt(2 / math.prod(shape[1:]))
        out[name] = x
    return out


def convolved(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Convolution by loops: ceil(n / stride) values per axis, zeros outside, half of them, rounded down, in front."""
    k = kernel.shape[2]
    out = [-(-n // stride) for n in x.shape[1:]]
    front = [max((o - 1) * stride + k - n, 0) // 2 for o, n in zip(out, x.shape[1:], strict=True)]
    result = np.zeros((len(kernel), *out))
    for place in np.ndindex(*out):
        for tap in np.ndindex(k, k, k):
            at = tuple(p * stride + t - f for p, t, f in zip(place, tap, front, strict=True))
            if all(0 <= a < n for a, n in zip(at, x.shape[1:], strict=True)):
                result[(slice(None), *place)] += kernel[(slice(None), slice(None), *tap)] @ x[(slice(None), *at)]
    return result


@pytest.mark.parametrize("layer, stride, shape", [("Conv3d_2c_3x3", 1, (3, 4, 5)), ("Conv3d_1a_7x7", 2, (4, 5, 6))])
def test_a_layer_is_a_padded_convolution_a_normalisation_and_a_relu(layer, stride, shape):
    own = weights()
    inner = own[f"{layer}.conv3d.weight"].shape[1]
    x = torch.randn(1, inner, *shape, generator=torch.Generator().manual_seed(1))
    plain = convolved(x[0].double().numpy(), own[f"{layer}.conv3d.weight"].double().numpy(), stride)
    bn = {
        part: own[f"{layer}.bn.{part}"].double().numpy() for part in ("weight", "bias", "running_mean", "running_var")
    }
    each = [v.reshape(-1, 1, 1, 1) for v in bn.values()]
    wanted = np.maximum((plain - each[2]) / np.sqrt(each[3] + 1e-3) * each[0] + each[1], 0)
    found = i3d.I3D(own, "i3d")._layer(layer, x, stride)[0].double().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * wanted.max())
    assert (wanted > 0).mean() > 0.1


def test_pooling_pads_behind():
    """4 values, windows of 3, stride 2: one zero behind. Windows 0-2 and 2-4."""
    x = torch.tensor([1.0, 5, 2, 3]).view(1, 1, 1, 1, 4)
    assert i3d.pooled(x, (1, 1, 3), (1, 1, 2)).flatten().tolist() == [5, 3]


def test_the_table_of_tensors():
    """57 convolutions with normalisation and one without; 12.3 million parameters before the 400 logits."""
    found = i3d.tensors()
    trained = {name: math.prod(shape) for name, shape in found.items() if "running" not in name}
    assert len(i3d.layers()) == 57 and len(found) == 57 * 5 + 2
    assert sum(trained.values()) - (1024 * 400 + 400) == 12_287_264


def test_features_of_a_clip(tmp_path):
    """Features depend on time and on the picture, and not on the size of the picture beyond its resampling."""
    save_file(weights(), tmp_path / "i3d.safetensors")
    net = Network(i3d.read_i3d(tmp_path / "i3d.safetensors", CPU), "i3d=file", CPU)
    draw = torch.Generator().manual_seed(2)
    clip = torch.randint(0, 256, (9, 28, 28, 3), generator=draw, dtype=torch.uint8)
    found = net.features(clip)
    assert found.shape == (400,) and found.dtype == torch.float64
    assert (net.features(clip.flip(0)) - found).abs().max() > 1e-3 * found.abs().max()
    with pytest.raises(ValueError, match="got clips of 8 frames; wanted 9 or more, FVD takes 16"):
        net.features(clip[:8])


def test_other_weights_are_refused(tmp_path):
    own = weights()
    del own["Mixed_4c.b1b.conv3d.weight"]
    save_file(own, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"Mixed_4c.b1b.conv3d.weight is no such tensor, wanted \[224, 112, 3, 3, 3\]"):
        i3d.read_i3d(tmp_path / "a.safetensors", CPU)
    with pytest.raises(ValueError, match="is damaged|damaged or missing"):
        i3d.read_i3d(tmp_path / "none.safetensors", CPU)
