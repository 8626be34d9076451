"""Wan's network against diffusers' WanTransformer3DModel with the same random weights; errors for bad inputs."""

import inspect
from dataclasses import fields, replace

import pytest
import torch
from helpers import with_random_norms
from torch import Tensor

from fastlightgen.config import preset
from fastlightgen.models.base import Cond
from fastlightgen.models.folder.weights import build
from fastlightgen.models.wan.model import WanConfig, WanModel

BASE = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
BASE |= {"num_layers": 3}
I2V = {"in_channels": 36, "image_dim": 8, "added_kv_proj_dim": 24}
CASES = {  # name -> (changes of BASE, latent size)
    "t2v": ({}, (3, 8, 8)),
    "one head": ({"num_attention_heads": 1, "attention_head_dim": 32}, (1, 4, 4)),
    "wide, narrow axes": ({"num_attention_heads": 5, "attention_head_dim": 20, "eps": 1e-5}, (5, 4, 10)),
    "small latent": ({"in_channels": 6, "out_channels": 6, "num_attention_heads": 4}, (2, 2, 12)),
    "patches of 4 x 1": ({"patch_size": (1, 4, 1)}, (2, 8, 3)),
    "no cross_attn_norm": ({"cross_attn_norm": False}, (3, 6, 8)),
    "condition channels, no image tokens": ({"in_channels": 25, "out_channels": 12}, (3, 8, 6)),
    "i2v of Wan2.2": ({"in_channels": 36}, (3, 4, 6)),
    "i2v": (I2V, (3, 4, 6)),
    "i2v, no cross_attn_norm": (I2V | {"cross_attn_norm": False}, (1, 6, 4)),
}


def network(changes: dict, seed: int) -> WanModel:
    """A network with random weights, norms included, which start as the identity."""
    return with_random_norms(build(BASE | changes, seed), seed)


def stock(model: WanModel):
    """diffusers' class with the same configuration and weights."""
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.WanTransformer3DModel(**{k: v for k, v in model.config.items() if k != "_class_name"})
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def ask(other, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    x = x_t if cond.image is None else torch.cat([x_t, cond.image], 1)
    return other(x, 1000 * t, cond.text, cond.image_embeds).sample


@pytest.mark.parametrize(("changes", "size"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_equals_diffusers(changes: dict, size: tuple[int, int, int]):
    model = network(changes, seed=1)
    x_t, t, cond, null = model.example_inputs(batch=2, seed=2, size=size)
    other = stock(model)
    for time, prompt in [(t, cond), (torch.tensor([1.0, 1e-4]), null)]:
        got, want = model(x_t, time, prompt), ask(other, x_t, time, prompt)
        assert got.shape == x_t.shape and want.std() > 0.1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # float32 roundings through 3 blocks


@torch.no_grad()
def test_time_as_a_number_and_a_single_condition_are_broadcast():
    model = build(BASE, seed=1)
    x_t, _, cond, _ = model.example_inputs(batch=2)
    one = Cond(cond.text[:1])
    want = ask(stock(model), x_t, torch.tensor([0.25, 0.25]), Cond(one.text.expand_as(cond.text)))
    torch.testing.assert_close(model(x_t, 0.25, one), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, I2V], ids=["t2v", "i2v"])
@torch.no_grad()
def test_bf16_errs_no_more_than_diffusers_in_bf16(changes: dict):
    model = network(changes | {"num_layers": 4}, seed=3)
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(3, 6, 8))
    other = stock(model)
    low = stock(model)
    for name, p in low.named_parameters():  # the types after from_pretrained(torch_dtype=bfloat16)
        if not any(part in name for part in low._keep_in_fp32_modules):
            p.data = p.data.bfloat16()

    def bf16(v: Tensor) -> Tensor:
        return v.bfloat16()

    exact = ask(other.double(), x_t.double(), t, cond.map(Tensor.double))
    theirs = ask(low, bf16(x_t), t, cond.map(bf16)).double() - exact
    ours = model.bfloat16()(bf16(x_t), t, cond.map(bf16))
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


@torch.no_grad()
def test_bf16_modulates_bit_for_bit_as_diffusers_in_bf16():
    """What enters the first self-attention: diffusers adds table and time in float32, also when both are bfloat16."""
    model = network({}, seed=4).bfloat16()
    other = stock(model).bfloat16()
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(3, 6, 8))
    seen = []
    for net in (model, other):
        net.blocks[0].attn1.to_q.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(x_t.bfloat16(), t, cond.map(Tensor.bfloat16))
    ask(other, x_t.bfloat16(), t, cond.map(Tensor.bfloat16))
    assert seen[0].dtype == torch.bfloat16 and torch.equal(*seen)


@torch.no_grad()
def test_float64_runs_in_float64():
    model = network({}, seed=1).double()
    x_t, t, cond, _ = model.example_inputs()
    got = model(x_t.double(), t, cond.map(Tensor.double))
    # diffusers computes norms in float32 even then, which limits the agreement.
    want = ask(stock(model).double(), x_t.double(), t, cond.map(Tensor.double))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_configuration_has_diffusers_fields_and_defaults():
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(diffusers.WanTransformer3DModel.__init__).parameters
    ours = {f.name: f.default for f in fields(WanConfig) if f.name != "kept_attention_heads"}  # of width pruning
    assert ours == {k: p.default for k, p in theirs.items() if k != "self"}


@pytest.mark.parametrize(
    ("name", "count", "block"),
    [
        ("wan2.1-t2v-1.3b", 1_418_996_800, 46_440_704),
        ("wan2.1-t2v-14b", 14_288_491_584, 351_394_304),
        ("wan2.1-i2v-14b", 16_394_878_784, 403_838_464),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int, block: int):
    with torch.device("meta"):
        model = build(preset(name)["network"])
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.blocks[0].parameters()) == block


@torch.no_grad()
@pytest.mark.parametrize("keep", [[0, 2], [1], [0, 1, 2]])
def test_prune_equals_skipping_bit_for_bit(keep: list[int]):
    model = network(I2V, seed=4)
    x_t, t, cond, _ = model.example_inputs(size=(2, 4, 4))
    skipped = model(x_t, t, cond, keep=keep)
    assert (skipped - model(x_t, t, cond)).abs().max() > 1e-3 or len(keep) == 3
    pruned = model.prune(keep[::-1])  # the order of `keep` does not matter
    assert pruned is model and model.num_blocks == len(keep) == model.config["num_layers"]
    assert torch.equal(model(x_t, t, cond), skipped)
    torch.testing.assert_close(ask(stock(model), x_t, t, cond), skipped, rtol=0, atol=1e-5)


def test_example_inputs_are_a_function_of_the_seed():
    model = build(BASE | I2V, seed=0)
    a, b, c = (model.example_inputs(batch=2, seed=s, size=(1, 2, 2)) for s in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[3].text, b[3].text) and not torch.equal(a[0], c[0])
    assert torch.equal(a[2].image, a[3].image) and not torch.equal(a[2].text, a[3].text)  # null differs in text only


def bad(x_t: Tensor, cond: Cond, case: str) -> tuple[Tensor, Cond]:
    text = cond.text
    return {
        "channels": (x_t[:, :5], cond),
        "no image": (x_t, replace(cond, image=None)),
        "patch": (x_t[..., :5], replace(cond, image=cond.image[..., :5])),
        "image frames": (x_t, replace(cond, image=cond.image[:, :, :1])),
        "text width": (x_t, replace(cond, text=text[..., :7])),
        "text length": (x_t, replace(cond, text=text[:, :64])),
        "text batch": (x_t, replace(cond, text=text.repeat(2, 1, 1))),
        "image_embeds": (x_t, replace(cond, image_embeds=None)),
        "image_embeds batch": (x_t, replace(cond, image_embeds=cond.image_embeds.repeat(2, 1, 1))),
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("channels", r"Wan: 25 channels \(latent \+ condition\), this network takes 36"),
        ("no image", r"Wan: 16 channels \(latent \+ condition\), this network takes 36"),
        ("patch", r"Wan: latent size \(2, 4, 5\) is not a multiple of the patch \(1, 2, 2\)"),
        ("image frames", r"Wan: image is \(2, 20, 1, 4, 6\), the latent \(2, 16, 2, 4, 6\)"),
        ("text width", "Wan: text embedding is 7 wide, this network takes 20"),
        ("text length", "Wan I2V: 64 text tokens; pad the text embedding to 512"),
        ("text batch", "Wan: text has batch 4, the latent 2"),
        ("image_embeds", "Wan: image_embeds must be given exactly when image_dim is set"),
        ("image_embeds batch", "Wan: image_embeds has batch 4, the latent 2"),
    ],
)
def test_bad_input(case: str, message: str):
    model = build(BASE | I2V | {"num_layers": 1}, seed=0)
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 4, 6))
    with pytest.raises(ValueError, match=message):
        model(*bad(x_t, cond, case)[:1], t, bad(x_t, cond, case)[1])


def test_image_tokens_for_a_network_without_them():
    model = build(BASE | {"num_layers": 1}, seed=0)
    x_t, t, cond, _ = model.example_inputs()
    with pytest.raises(ValueError, match=r"image_embeds must be given exactly when image_dim is set \(it is None\)"):
        model(x_t, t, replace(cond, image_embeds=torch.zeros(1, 257, 8)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": (2, 2, 2)}, "patch_size is 2; only 1 is supported"),
        ({"qk_norm": None}, "qk_norm: is null, wanted a text"),
        ({"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm'; only 'rms_norm_across_heads'"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514; only None"),
        ({"image_dim": 8}, "added_kv_proj_dim is None; it must be 24"),
        ({"image_dim": 8, "added_kv_proj_dim": 16}, "added_kv_proj_dim is 16; it must be 24"),
        ({"added_kv_proj_dim": 24}, "null without one"),
    ],
)
def test_unsupported_configuration(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build(BASE | changes)


@pytest.mark.parametrize("keep", [[], [3], [-1, 0]])
def test_bad_keep(keep: list[int]):
    model = build(BASE, seed=0)
    x_t, t, cond, _ = model.example_inputs()
    for call in (lambda: model(x_t, t, cond, keep=keep), lambda: model.prune(keep)):
        with pytest.raises(ValueError, match="^keep: "):
            call()
    assert model.num_blocks == 3
