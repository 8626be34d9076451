"""Random walks of Wan and HunyuanVideo: any streams together give bit for bit what pruned networks give alone."""

from copy import deepcopy

import pytest
import torch
from helpers import small_hunyuan, small_wan
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from fastlightgen.models.base import Features, Stream, VideoDiT

N = 5
KEEPS = st.lists(st.integers(0, N - 1), min_size=1, max_size=N, unique=True)
STREAMS = st.lists(st.tuples(st.sampled_from("abc"), st.none() | KEEPS, st.booleans()), min_size=1, max_size=7)


@pytest.fixture(scope="module")
def cases() -> dict[str, tuple]:
    """family -> network, latent, times, three prompts of which one is short."""
    out = {}
    for family, model in (("wan", small_wan(N)), ("hunyuan", small_hunyuan(2, N - 2))):
        x_t, t, a, b = model.example_inputs(batch=2, size=(2, 4, 4))
        c = model.example_inputs(batch=2, seed=1, size=(2, 4, 4))[2]
        out[family] = model, x_t, t, {"a": a, "b": b, "c": c}
    return out


def alone(model: VideoDiT, x_t, t, cond, keep):
    """The prediction of a network that has no other blocks."""
    return (model if keep is None else deepcopy(model).prune(sorted(keep)))(x_t, t, cond)


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@tried(25)
@given(streams=STREAMS)
def test_streams_do_not_notice_each_other(cases, family, streams):
    model, x_t, t, prompts = cases[family]
    model.block_calls = 0
    with torch.no_grad():
        out = model.walk(x_t, t, [Stream(prompts[p], keep, grad) for p, keep, grad in streams])
        calls = model.block_calls
        for v, (p, keep, _) in zip(out, streams):
            assert torch.equal(v, alone(model, x_t, t, prompts[p], keep))
    # A block is evaluated once for every different past: the prompt, and the blocks that ran before it.
    kept = [(p, sorted(range(N) if keep is None else keep)) for p, keep, _ in streams]
    pasts = {(i, p, tuple(j for j in keep if j < i)) for p, keep in kept for i in keep}
    assert calls == len(pasts)


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@tried(10)
@given(streams=STREAMS)
def test_gradients_and_features_are_those_of_each_stream(cases, family, streams):
    """What carries gradient, and the hidden states after the last block that runs, beside the other streams."""
    model, x_t, t, prompts = cases[family]
    model.zero_grad()
    last = [max(range(N) if keep is None else keep) for _, keep, _ in streams]
    kept = [Features([i]) for i in last]
    asked = [Stream(prompts[p], keep, grad, features=f) for (p, keep, grad), f in zip(streams, kept)]
    out = model.walk(x_t, t, asked)
    assert [v.requires_grad for v in out] == [grad for _, _, grad in streams]
    for stream, own, i in zip(asked, kept, last):
        single = Features([i])
        model.walk(x_t, t, [Stream(stream.cond, stream.keep, stream.grad, features=single)])
        assert torch.equal(own[i], single[i]) and own[i].requires_grad == stream.grad
    total = sum((v.square().sum() for v in out if v.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    ran = {i for _, keep, grad in streams if grad for i in (range(N) if keep is None else keep)}
    found = {i for i, block in enumerate(model.blocks) if any(p.grad is not None for p in block.parameters())}
    assert found == ran
