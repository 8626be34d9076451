"""The planner's memory of the VAE that decodes previews, against diffusers' VAE on the meta device (no memory used)."""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlightgen.config import plan_root, preset
from fastlightgen.planner.budget import load_network
from fastlightgen.planner.memory import previews
from fastlightgen.planner.step import planned_step, undropped

diffusers = pytest.importorskip("diffusers")


class Peak(TorchDispatchMode):
    """The peak, in bytes, of the tensors that are created inside and alive at the same time."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@pytest.mark.parametrize(
    ("model", "kind", "size"),
    [
        ("wan2.1-t2v-1.3b", "AutoencoderKLWan", "480x832x9"),
        ("hunyuanvideo-t2v", "AutoencoderKLHunyuanVideo", "480x832x33"),
    ],
)
def test_decoding_in_tiles(model, kind, size):
    height, width, frames = map(int, size.split("x"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        vae = getattr(diffusers, kind)().requires_grad_(False)
        vae.enable_tiling()
        with torch.no_grad(), Peak() as found:
            vae.decode(torch.empty(1, 16, (frames + 3) // 4, height // 8, width // 8))
    cfg = plan_root()(model=model, size=size)
    net = load_network(preset(model)["network"], size, 0)
    weights, clips = previews(planned_step(net, cfg, undropped(len(net.blocks), 0.3)), cfg)
    assert weights == pytest.approx(4 * sum(p.numel() for p in vae.parameters()), rel=0.01)
    assert clips == pytest.approx(found.peak, rel=0.1)
