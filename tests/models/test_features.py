"""Hidden states that a walk keeps: those of the same stream block by block, in both families, with their gradients."""

import pytest
import torch
from helpers import small_hunyuan, small_wan
from torch import Tensor

from fastlightgen.models.base import Features, Job, Stream, VideoDiT

NETWORKS = {
    "wan": lambda: small_wan(5),
    "hunyuan": lambda: small_hunyuan(2, 3),
    "token replace": lambda: small_hunyuan(2, 3, image_condition_type="token_replace", in_channels=12),
}
KEEP = [0, 1, 3, 4]


def inputs(family: str):
    net = NETWORKS[family]().double()
    x_t, t, cond, null = net.example_inputs(2, size=(2, 4, 4))
    wide = lambda v: v.double() if v.is_floating_point() else v  # noqa: E731
    return net, x_t.double(), t, cond.map(wide), null.map(wide)


def settled(state) -> Tensor:
    """x + gate y of a state and of its other sequences, one after the other."""
    rows = [s.x if s.y is None else s.x + s.y * s.gate[:, None] for s in (state, *state.others)]
    return torch.cat(rows, 1)


def alone(net: VideoDiT, x_t, t, cond, keep) -> dict[int, Tensor]:
    """The image tokens (8 per clip here) after every block that runs, without the walk."""
    tables = net.tables(x_t, t)
    prompt = net.prompt(cond, tables)
    state, out = net.embed(x_t, prompt), {}
    for i in keep:
        ((state,),) = net.blocks[i]([Job(state, [prompt], [True])], tables)
        out[i] = settled(state)[:, :8]
    return out


@pytest.mark.parametrize("family", NETWORKS)
@torch.no_grad()
def test_hidden_states_are_those_of_the_stream(family):
    net, x_t, t, cond, null = inputs(family)
    asked = [Features([1, 4]), Features([0, 3]), Features([2, 4])]
    streams = [Stream(cond, KEEP, features=asked[0]), Stream(null, KEEP, features=asked[1])]
    streams += [Stream(cond, features=asked[2]), Stream(cond, KEEP)]
    plain = net.walk(x_t, t, [Stream(s.cond, s.keep) for s in streams])
    for v, without in zip(net.walk(x_t, t, streams), plain, strict=True):
        assert torch.equal(v, without)  # keeping hidden states changes no bit of a prediction
    for stream, features in zip(streams, asked, strict=False):
        wanted = alone(net, x_t, t, stream.cond, stream.keep or range(5))
        assert set(features) == set(features.blocks)
        for i, h in features.items():
            assert h.shape == (2, 8, net.cfg.dim)
            torch.testing.assert_close(h, wanted[i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", NETWORKS)
def test_their_gradients_reach_the_latent_and_the_weights(family, checkpointing):
    net, x_t, t, cond, _ = inputs(family)
    net.checkpointing = checkpointing
    x_t.requires_grad_(True)
    inputs_ = [x_t, *net.blocks[0].parameters()]

    def total(features) -> Tensor:
        return sum((n + 1) * h.square().sum() for n, h in enumerate(features[i] for i in (1, 4)))

    kept, other = Features([1, 4]), Features([1])
    net.walk(x_t, t, [Stream(cond, KEEP, grad=True, features=kept), Stream(cond, features=other)])
    assert not other[1].requires_grad and torch.equal(other[1], kept[1])  # the paths are one up to block 1
    got = torch.autograd.grad(total(kept), inputs_, allow_unused=True)
    wanted = torch.autograd.grad(total(alone(net, x_t, t, cond, KEEP)), inputs_, allow_unused=True)
    assert got[0].abs().max() > 0
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())
