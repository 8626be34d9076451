"""Wan2.2 TI2V's network against diffusers' WanTransformer3DModel, which takes a time per token [B, L]."""

from dataclasses import replace

import pytest
import torch
from helpers import with_random_norms
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import preset
from fastlightgen.models.base import Cond, Stream
from fastlightgen.models.families import build
from fastlightgen.models.sample import sample
from fastlightgen.models.wan_ti2v.model import TI2VModel

BASE = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 48, "out_channels": 48}
BASE |= {"text_dim": 20, "freq_dim": 32, "ffn_dim": 40, "num_layers": 4}
GIVEN = {"text": [False, False], "picture": [True, True], "mixed": [True, False]}
CASES = {  # name -> (changes of BASE, latent size)
    "three frames": ({}, (3, 4, 6)),
    "one frame": ({}, (1, 4, 4)),
    "five frames, five heads": ({"num_attention_heads": 5, "attention_head_dim": 20, "eps": 1e-5}, (5, 4, 10)),
    "no cross_attn_norm": ({"cross_attn_norm": False}, (2, 6, 4)),
    "12 channels": ({"in_channels": 12, "out_channels": 12, "expand_timesteps": True}, (3, 2, 8)),
}


def network(changes: dict, seed: int = 1) -> TI2VModel:
    """A network with random weights, norms included, which start as the identity."""
    model = build(BASE | changes, seed)
    assert isinstance(model, TI2VModel)
    return with_random_norms(model, seed)


def stock(model: TI2VModel):
    """diffusers' class with the same configuration and weights."""
    diffusers = pytest.importorskip("diffusers")
    known = {k: v for k, v in model.config.items() if k not in ("_class_name", "expand_timesteps")}
    other = diffusers.WanTransformer3DModel(**known)
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def cut(cond: Cond, given: list[bool]) -> Cond:
    """The condition with the first frames of these clips alone; none at all if no clip has one."""
    assert cond.image is not None
    keep = torch.tensor(given).view(-1, 1, 1, 1, 1)
    return replace(cond, image=cond.image * keep if any(given) else None)


def ask(other, x_t: Tensor, t: Tensor, cond: Cond, first: Tensor, given: list[bool]) -> Tensor:
    """What diffusers' pipelines ask: the mask is 0 on a given first frame, as in pipeline_wan_i2v.py."""
    out = []
    for i, known in enumerate(given):
        mask = torch.ones_like(x_t[i : i + 1, :1])
        mask[:, :, 0] = 0.0 if known else 1.0
        x = (1 - mask) * first[i : i + 1] + mask * x_t[i : i + 1]
        ph, pw = other.config.patch_size[1:]
        steps = (mask[0][0][:, ::ph, ::pw] * 1000 * t[i]).flatten()[None]
        out.append(other(x, steps, cond.text[i : i + 1]).sample)
    return torch.cat(out)


def case(changes: dict, size: tuple[int, int, int], given: list[bool]):
    model = network(changes)
    x_t, t, cond, null = model.example_inputs(batch=2, seed=2, size=size)
    first, (cond, null) = cond.image[:, 1:], (cut(c, given) for c in (cond, null))
    return model, x_t, t, cond, replace(null, image=cond.image), first


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(("changes", "size"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_equals_diffusers(changes: dict, size: tuple[int, int, int], given: list[bool]):
    model, x_t, t, cond, null, first = case(changes, size, given)
    other = stock(model)
    for time, prompt in [(t, cond), (torch.tensor([1.0, 1e-2]), null)]:
        got, want = model(x_t, time, prompt), ask(other, x_t, time, prompt, first, given)
        for i, known in enumerate(given):  # the pipeline drops the prediction for a given frame
            torch.testing.assert_close(got[i, :, known:], want[i, :, known:], rtol=0, atol=1e-5)
        assert got.shape == x_t.shape and want.std() > 0.1


@torch.no_grad()
def test_float64_gradients_of_every_weight_equal_diffusers():
    with torch.enable_grad():
        model, x_t, t, cond, _, first = case({}, (3, 4, 4), [True, False])
        model, other = model.double(), stock(model).double()
        x_t, cond, first = x_t.double(), cond.map(Tensor.double), first.double()
        weight = torch.randn(x_t.shape, dtype=x_t.dtype, generator=torch.Generator().manual_seed(3))
        weight[0, :, 0] = 0
        for out in (model(x_t, t, cond), ask(other, x_t, t, cond, first, [True, False])):
            (out * weight).sum().backward()
    for name, p in other.named_parameters():
        # diffusers computes norms in float32, which limits the agreement.
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_the_preset_has_the_published_size():
    with torch.device("meta"):
        model = build(preset("wan2.2-ti2v-5b")["network"])
    assert isinstance(model, TI2VModel) and sum(p.numel() for p in model.parameters()) == 4_999_787_712


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_walk_equals_independent_forwards_bit_for_bit(checkpointing: bool):
    model, x_t, t, cond, null, _ = case({}, (3, 4, 4), [True, False])
    keep, text = [0, 2, 3], replace(cond, image=None)
    model.checkpointing = checkpointing
    streams = [Stream(cond, keep, grad=True), Stream(null, keep), Stream(cond), Stream(text)]
    model.block_calls = 0
    found = model.walk(x_t, t, streams)
    # Block 0: the pair with the picture shares it until the text enters. Two prompts: two calls. See test_walk.py.
    for v, stream in zip(found, streams, strict=True):
        assert torch.equal(v, model(x_t, t, stream.cond, stream.keep)) and v.requires_grad == stream.grad


@torch.no_grad()
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_prune_equals_skipping_bit_for_bit(given: list[bool]):
    model, x_t, t, cond, _, first = case({}, (3, 4, 4), given)
    skipped = model(x_t, t, cond, keep=[0, 2])
    assert (skipped - model(x_t, t, cond)).abs().max() > 1e-3
    model.prune([2, 0])
    assert torch.equal(model(x_t, t, cond), skipped) and model.config["num_layers"] == 2
    want = ask(stock(model), x_t, t, cond, first, given)
    torch.testing.assert_close(skipped[:, :, 1:], want[:, :, 1:], rtol=0, atol=1e-5)


def test_a_given_frame_is_read_clean_and_costs_no_loss():
    """Its noise changes nothing, its loss is zero up to rounding, and no weight gets a gradient from it."""
    model, x_0, t, cond, _, first = case({}, (3, 4, 4), [True, True])
    x_0 = torch.cat([first, x_0[:, :, 1:]], 2)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(5))
    other = noise.clone()
    other[:, :, 0] += 3
    v, v_other = (model(flow.add_noise(x_0, n, t), t, cond) for n in (noise, other))
    assert torch.equal(v[:, :, 1:], v_other[:, :, 1:])
    loss = (v - flow.velocity(x_0, noise))[:, :, 0].square()
    assert loss.max() < 1e-9  # (a few 2^-24 / t)^2, t > 0.02
    grads = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_registered_operators_take_a_modulation_per_frame(checkpointing: bool, monkeypatch):
    """The operators with kernels, which run where torch compiles, so this pretends that it does: v and gradients."""
    model, x_t, t, cond, _, _ = case({}, (3, 4, 4), [True, False])
    model.checkpointing = checkpointing
    found = []
    for fused in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda fused=fused: fused)
        v = model(x_t, t, cond)
        found.append([v, *torch.autograd.grad(v.square().mean(), list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ode", "stochastic"])
def test_samples_keep_the_given_frame_bit_for_bit(kind: str):
    model, noise, _, cond, null, first = case({}, (3, 4, 4), [True, False])
    x = sample(model, cond, null, noise, [1.0, 0.9, 0.5], 2.0, kind)
    assert torch.equal(x[0, :, :1], first[0]) and not torch.equal(x[1, :, :1], first[1])


def test_bfloat16_errs_no_more_than_diffusers_in_bfloat16():
    with torch.no_grad():
        model, x_t, t, cond, _, first = case({}, (3, 6, 8), [True, True])
        other, low = stock(model), stock(model)
        for name, p in low.named_parameters():  # the types after from_pretrained(torch_dtype=bfloat16)
            if not any(part in name for part in low._keep_in_fp32_modules):
                p.data = p.data.bfloat16()
        x_t, first, cond = x_t.bfloat16(), first.bfloat16(), cond.map(Tensor.bfloat16)
        wide = x_t.double(), t, cond.map(Tensor.double), first.double(), [True, True]
        exact = ask(other.double(), *wide)[:, :, 1:]
        theirs = ask(low, x_t, t, cond, first, [True, True])[:, :, 1:].double() - exact
        ours = model.bfloat16()(x_t, t, cond)[:, :, 1:].double() - exact
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c: (x[:, :5], c), r"Wan: 5 channels \(latent \+ condition\), this network takes 48"),
        (lambda x, c: (x, replace(c, image=c.image[:, 1:])), r"image is \(2, 48, 1, 4, 6\), wanted \(2, 49, 1, 4, 6\)"),
        (lambda x, c: (x, replace(c, image=c.image[..., :4])), r"image is \(2, 49, 1, 4, 4\), wanted"),
        (lambda x, c: (x, replace(c, image_embeds=torch.zeros(2, 257, 8))), "image_embeds must be given exactly"),
    ],
)
def test_bad_input(change, message: str):
    model = network({"num_layers": 1})
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 4, 6))
    x_t, cond = change(x_t, cond)
    with pytest.raises(ValueError, match=message):
        model(x_t, t, cond)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_dim": 8, "added_kv_proj_dim": 24}, "Wan2.2 TI2V config: image_dim is 8; only None is supported"),
        ({"expand_timesteps": True, "in_channels": 36}, "Wan2.2 TI2V config: in_channels is 36; only 48"),
        ({"in_channels": 16, "out_channels": 16, "expand_timesteps": False}, "expand_timesteps=false is not a key"),
    ],
)
def test_bad_configuration(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build(BASE | changes)
