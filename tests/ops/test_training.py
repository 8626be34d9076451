"""Networks on other backends: Stage II trains as on the reference, and every gradient obeys the error rule."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import rule
import torch
from torch import Tensor

from fastlightgen.models.base import Stream, VideoDiT
from fastlightgen.ops import dispatch

for _needed in ("omegaconf", "safetensors", "tqdm"):  # the other tests of the operators do not need them
    pytest.importorskip(_needed)
from helpers import batches, config, small_hunyuan, small_wan  # noqa: E402

from fastlightgen.stages.prune import Prune  # noqa: E402

CLIPS = [batches(1)(i) for i in range(4)]
EPS = torch.finfo(torch.float32).eps


@contextmanager
def reference() -> Iterator[None]:
    before, dispatch.backend_for = dispatch.backend_for, lambda device: "reference"
    yield
    dispatch.backend_for = before


def losses(steps: int, device: str, moved: float = 0.0, seed: int = 0) -> list[float]:
    """The losses of Stage II on three blocks, gradients through both paths; `moved` perturbs the weights relatively."""
    net, gen = small_wan(3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p *= 1 + moved * (2 * torch.rand(p.shape, generator=gen) - 1)
    net.to(device)
    clips = [clip.to(device) for clip in CLIPS]
    stage = Prune(
        config(2, "batch=1", "alpha=0.5"), net, [1], lambda step: clips[step % len(clips)], lambda: clips[0], {}
    )
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    out = []
    for step in range(steps):
        optimizer.zero_grad()
        loss, _ = stage.loss(step)
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def agrees(steps: int, device: str = "cpu") -> None:
    """Assert that the losses differ from the reference's by at most eight times the effect of rounding errors.

    The effect is the largest difference in three runs whose weights are changed in the last digit. Eight times: a step
    calls about sixty operators, whose errors are independent and add up like sqrt(60).
    """
    with reference():
        want = losses(steps, device)
        moved = [losses(steps, device, EPS, seed) for seed in range(3)]
    got = losses(steps, device)

    def away(run: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(run, want, strict=True))

    assert away(got) <= math.sqrt(64) * max(map(away, moved))


@pytest.mark.parametrize("steps", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_cuda_sources_train_as_the_reference(simt, steps: int):
    agrees(steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_gpu_trains_as_the_reference(monkeypatch, backend: str):
    if reason := dispatch._why_not(backend):
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "backend_for", lambda device: backend)
    agrees(100, "cuda")


def walked(net: VideoDiT, dtype: torch.dtype, keep_attention: int | None = None) -> dict[str, Tensor]:
    """The velocities of a pruned and a full stream, and the gradient of every parameter."""
    net = net.to(dtype)
    if keep_attention is not None:
        net.checkpointing, net.keep_attention = True, keep_attention
    x_t, t, cond, _ = net.example_inputs(batch=2, size=(2, 4, 4))
    net.zero_grad()
    out = net.walk(x_t.to(dtype), t, [Stream(cond, [0, 2], grad=True), Stream(cond, None, grad=True)])
    seeds = [torch.randn(v.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, v in enumerate(out)]
    torch.autograd.backward(out, seeds)
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    return {f"v{i}": v.detach() for i, v in enumerate(out)} | grads


NETWORKS = pytest.mark.parametrize("make", [lambda: small_wan(3), lambda: small_hunyuan(2, 1)], ids=["wan", "hunyuan"])


@NETWORKS
def test_networks_on_the_cuda_sources(simt, make):
    with reference():
        exact, own = walked(make(), torch.float64), walked(make(), torch.float32)
    # A gradient is a sum over 2 streams x 2 samples x 8 image and up to 16 text tokens.
    rule.check(walked(make(), torch.float32), own, exact, terms=2 * 2 * 24)


@NETWORKS
@pytest.mark.parametrize("keep_attention", [0, 2])
def test_checkpointing_goes_through_the_operators(simt, make, keep_attention: int):
    """Checkpoints recompute the operators in the backward pass, also when a dispatch mode decides what they keep.

    A checkpointed block adds its residual itself, so the next block calls another norm: equal up to rounding.
    """
    with reference():
        exact, own = walked(make(), torch.float64), walked(make(), torch.float32)
    again = [walked(make(), torch.float32, keep_attention) for _ in range(2)]
    rule.check(again[0], own, exact, terms=2 * 2 * 24)
    assert rule.same(*again)
