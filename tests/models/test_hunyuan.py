"""HunyuanVideo against diffusers' HunyuanVideoTransformer3DModel with equal random weights; errors for bad inputs."""

import inspect
from dataclasses import fields, replace

import pytest
import torch
from helpers import counted_flops
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import preset
from fastlightgen.models.base import Cond
from fastlightgen.models.folder.weights import build, load_model, save_model
from fastlightgen.models.hunyuan.layers import HunyuanConfig
from fastlightgen.models.hunyuan.model import HunyuanModel

BASE = {"_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 12}
BASE |= {"rope_axes_dim": [4, 4, 4], "text_embed_dim": 20, "pooled_projection_dim": 10}
BASE |= {"num_layers": 2, "num_single_layers": 3}
CONCAT = {"in_channels": 33, "image_condition_type": "latent_concat", "guidance_embeds": False}
REPLACE = {"image_condition_type": "token_replace"}
VARIANTS = {"t2v": {}, "latent_concat": CONCAT, "token_replace": REPLACE}
ODD = {"num_attention_heads": 3, "attention_head_dim": 20, "rope_axes_dim": [4, 6, 10], "num_refiner_layers": 1}
ODD |= {"mlp_ratio": 2.5, "rope_theta": 100.0, "out_channels": 6, "num_single_layers": 1}
ODD_CHANNELS = {"t2v": 6, "latent_concat": 13, "token_replace": 6}


def network(changes: dict, seed: int) -> HunyuanModel:
    """A network with random weights, biases and norms included, which start small or as the identity."""
    model = build(BASE | changes, seed)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += (0.3 if "norm" in name or "bias" in name else 0.02) * torch.randn(p.shape, generator=gen)
    return model


def stock(model: HunyuanModel):
    """diffusers' class with the same configuration and weights."""
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.HunyuanVideoTransformer3DModel(**{k: v for k, v in model.config.items() if k != "_class_name"})
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def ask(other, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """diffusers' prediction, called as its pipelines call it."""
    kind, x = other.config.image_condition_type, x_t
    if kind == "latent_concat":
        x = torch.cat([x_t, cond.image], 1)
    elif kind == "token_replace":
        x = torch.cat([cond.image[:, :, :1], x_t[:, :, 1:]], 2)
    length = torch.full((len(x),), cond.text.shape[1]) if cond.text_len is None else cond.text_len
    mask = (torch.arange(cond.text.shape[1]) < length[:, None]).long()
    guidance = None if cond.guidance is None else 1000 * cond.guidance
    return other(x, 1000 * t, cond.text, mask, cond.pooled, guidance).sample


def predicted(model: HunyuanModel, v: Tensor) -> Tensor:
    """The frames of v that come from the network's output, not from the given image."""
    return v[:, :, 1:] if model.replaces_first else v


@pytest.mark.parametrize("kind", VARIANTS)
@pytest.mark.parametrize(("odd", "size"), [(False, (3, 6, 8)), (True, (5, 4, 2))], ids=["small", "odd"])
@torch.no_grad()
def test_equals_diffusers(kind: str, odd: bool, size: tuple[int, int, int]):
    model = network(VARIANTS[kind] | (ODD | {"in_channels": ODD_CHANNELS[kind]} if odd else {}), seed=1)
    x_t, t, cond, null = model.example_inputs(batch=2, seed=2, size=size)
    other = stock(model)
    for time, prompt in [
        (t, replace(cond, text_len=torch.tensor([3, 11]))),  # different lengths, padded
        (torch.tensor([1.0, 1e-4]), replace(null, text_len=torch.tensor([5, 5]))),  # no mask is needed
        (t, replace(cond, text_len=None)),
    ]:
        got, want = model(x_t, time, prompt), ask(other, x_t, time, prompt)
        assert got.shape == x_t.shape and want.std() > 0.1
        # float32 roundings through 5 blocks
        torch.testing.assert_close(predicted(model, got), predicted(model, want), rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_condition_counts():
    model = network({}, seed=1)
    x_t, t, cond, null = model.example_inputs(batch=2, size=(1, 4, 4))
    v = model(x_t, t, cond)
    for name, other in (
        ("text", null.text),
        ("text_len", cond.text_len % 16 + 1),
        ("pooled", null.pooled),
        ("guidance", cond.guidance / 6),
    ):
        assert (model(x_t, t, replace(cond, **{name: other})) - v).abs().max() > 1e-3, name
    # Without a guidance scale the prediction equals that of scale 1, for the prompt alone.
    one = replace(cond, guidance=torch.ones(2))
    assert torch.equal(model(x_t, t, replace(cond, guidance=None)), model(x_t, t, one))
    # Tokens beyond text_len are not read.
    beyond = torch.arange(16) >= cond.text_len[:, None]
    assert beyond.any() and torch.equal(model(x_t, t, replace(cond, text=cond.text + 7 * beyond[..., None])), v)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_bf16_errs_no_more_than_diffusers_in_bf16(changes: dict):
    model = network(changes, seed=3)
    x_t, t, cond, _ = model.example_inputs(batch=4, size=(3, 6, 8))
    other, low = stock(model), stock(model).bfloat16()

    def bf16(v: Tensor) -> Tensor:
        return v if v is cond.text_len else v.bfloat16()

    def exact64(v: Tensor) -> Tensor:
        return v if v is cond.text_len else bf16(v).double()  # all three networks get the rounded inputs

    exact = predicted(model, ask(other.double(), bf16(x_t).double(), t, cond.map(exact64)))
    stock_error = predicted(model, ask(low, bf16(x_t), t, cond.map(bf16))).double() - exact
    v = predicted(model, model.bfloat16()(bf16(x_t), t, cond.map(bf16)))
    assert v.dtype == torch.bfloat16
    # Both networks round the weights and every activation to bf16, so their errors have the same expected size. The
    # factor 1.1 allows for chance: over 4 x 16 x 2 or more rows of 48 numbers the size varies by a few per cent.
    assert (v.double() - exact).square().mean().sqrt() <= 1.1 * stock_error.square().mean().sqrt()


@torch.no_grad()
def test_float64_runs_in_float64():
    model = network(REPLACE, seed=1).double()
    x_t, t, cond, _ = model.example_inputs(batch=2)

    def wide(v: Tensor) -> Tensor:
        return v if v is cond.text_len else v.double()

    got, want = model(x_t.double(), t, cond.map(wide)), ask(stock(model).double(), x_t.double(), t, cond.map(wide))
    assert got.dtype == torch.float64
    # diffusers computes positions and rotations in float32 even then, which limits the agreement.
    torch.testing.assert_close(got[:, :, 1:], want[:, :, 1:], rtol=0, atol=2e-6)


def test_the_given_frame_is_no_prediction():
    """token_replace: on frame 0 x0 is the image, the flow-matching loss is 0, and no parameter gets a gradient."""
    model = network(REPLACE, seed=1).double()
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(3, 4, 4))
    x0, noise = x_t.double(), torch.randn_like(x_t, dtype=torch.float64)
    cond = replace(cond, image=x0)  # the network reads frame 0 of it
    x_t = flow.add_noise(x0, noise, t.double())
    v = model(x_t, t, cond)
    error = (v - flow.velocity(x0, noise))[:, :, 0]
    assert error.abs().max() < 1e-12 and (v - flow.velocity(x0, noise))[:, :, 1:].abs().max() > 0.1
    gradients = torch.autograd.grad(v[:, :, 0].sum(), list(model.parameters()), allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    with torch.no_grad():  # sampling ends in the image from any noise, in 4 steps or one
        for times in (flow.ladder(4, 7.0), [1.0]):
            end = flow.rollout(lambda x, s: model(x, s, cond), noise, times, "ode", lambda _: noise)
            # A walk rounds t to float32: relative error 6e-8 of values below 5, in each step.
            torch.testing.assert_close(end[:, :, 0], x0[:, :, 0], rtol=0, atol=1e-6)
        other = x_t.clone()
        other[:, :, 0] += 3.0
        assert torch.equal(model(other, t, cond)[:, :, 1:], v[:, :, 1:])


def test_configuration_has_diffusers_fields_and_defaults():
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(diffusers.HunyuanVideoTransformer3DModel.__init__).parameters
    ours = {f.name: f.default for f in fields(HunyuanConfig) if f.name != "kept_attention_heads"}  # of width pruning
    assert ours == {k: p.default for k, p in theirs.items() if k != "self"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("hunyuanvideo-t2v", 12_821_012_544),
        ("hunyuanvideo-i2v", 12_810_991_680),
        ("hunyuanvideo-i2v-token-replace", 12_821_012_544),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int):
    with torch.device("meta"):
        model = build(preset(name)["network"])

    def size(m) -> int:
        return sum(p.numel() for p in m.parameters())

    assert size(model) == count
    assert {size(b) for b in model.transformer_blocks} == {339_831_296} and len(model.transformer_blocks) == 20
    assert {size(b) for b in model.single_transformer_blocks} == {141_591_808} and model.num_blocks == 60
    if name == "hunyuanvideo-t2v":
        assert count - sum(size(b) for b in model.blocks) == 360_714_304


def test_blocks_cost_what_torch_counts():
    for changes in ({}, REPLACE):
        model = network(changes, seed=0)
        x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 4, 6))
        cond = replace(cond, text_len=None)
        assert model.block_flops(x_t, cond) == counted_flops(model, x_t, t, cond)


def test_units_are_two_lists_in_one():
    names = [(u["name"], u["kind"], u["index"]) for u in network({}, seed=0).units()]
    assert names[1:3] == [("double.1", "double", 1), ("single.0", "single", 2)] and len(names) == 5


@torch.no_grad()
@pytest.mark.parametrize("keep", [[0, 2, 4], [1], [3], [0, 1], [2, 3, 4], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("kind", ["t2v", "token_replace"])
def test_prune_equals_skipping_bit_for_bit(kind: str, keep: list[int]):
    model = network(VARIANTS[kind], seed=4)
    x_t, t, cond, _ = model.example_inputs(batch=2, seed=1, size=(2, 4, 4))
    skipped = model(x_t, t, cond, keep=keep)
    assert (skipped - model(x_t, t, cond)).abs().max() > 1e-3 or len(keep) == 5
    pruned = model.prune(keep[::-1])  # the order of `keep` does not matter
    assert pruned is model and model.num_blocks == len(keep)
    assert model.config["num_layers"] == sum(i < 2 for i in keep) == len(keep) - model.config["num_single_layers"]
    assert torch.equal(model(x_t, t, cond), skipped)
    other = ask(stock(model), x_t, t, cond)
    torch.testing.assert_close(predicted(model, other), predicted(model, skipped), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pruned_folder_loads_in_stock_diffusers(tmp_path):
    theirs = pytest.importorskip("diffusers").HunyuanVideoTransformer3DModel
    pytest.importorskip("accelerate", reason="diffusers needs accelerate for from_pretrained")
    model = network(CONCAT, seed=5)
    x_t, t, cond, _ = model.example_inputs(batch=2, seed=1, size=(3, 4, 4))
    skipped = model(x_t, t, cond, keep=[1, 2, 4])
    folder = save_model(model.prune([1, 2, 4]), tmp_path / "m")
    other, report = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and len(other.single_transformer_blocks) == 2
    torch.testing.assert_close(ask(other.eval(), x_t, t, cond), skipped, rtol=0, atol=1e-5)
    assert torch.equal(load_model(folder)(x_t, t, cond), skipped)


@torch.no_grad()
def test_time_as_a_number_and_a_single_condition_are_broadcast():
    model = network(CONCAT, seed=1)
    x_t, _, cond, _ = model.example_inputs(batch=2, size=(2, 4, 4))
    one = Cond(cond.text[:1], cond.text_len[:1], cond.image, pooled=cond.pooled[:1])
    both = one.map(lambda v: v.expand(2, *v.shape[1:]))
    want = ask(stock(model), x_t, torch.tensor([0.25, 0.25]), both)
    torch.testing.assert_close(model(x_t, 0.25, one), want, rtol=0, atol=1e-5)


def test_example_inputs_are_a_function_of_the_seed():
    model = build(BASE | CONCAT, seed=0)
    a, b, c = (model.example_inputs(batch=2, seed=s, size=(1, 2, 2)) for s in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[3].text, b[3].text) and not torch.equal(a[0], c[0])
    assert a[2].image is a[3].image and not torch.equal(a[2].text, a[3].text)  # null differs in text only


BAD = {  # name -> (changes of the configuration, changes of the inputs, message)
    "channels": (CONCAT, {"x_t": (2, 5, 2, 4, 6)}, r"22 channels \(latent \+ condition\), this network takes 33"),
    "no image": (CONCAT, {"image": None}, r"16 channels \(latent \+ condition\), this network takes 33"),
    "patch": (REPLACE, {"x_t": (2, 16, 2, 4, 5)}, r"latent size \(2, 4, 5\) is not a multiple of the patch \(1, 2"),
    "image frames": (CONCAT, {"image": (2, 17, 1, 4, 6)}, r"image is \(2, 17, 1, 4, 6\), the latent \(2, 16, 2, 4"),
    "no first frame": (REPLACE, {"image": None}, r"image is None; token_replace wants \(2, 16, 1, 4, 6\), frame 0"),
    "other first frame": (REPLACE, {"image": (2, 17, 1, 4, 6)}, r"image is \(2, 17, 1, 4, 6\); token_replace wants"),
    "text width": ({}, {"text": (2, 16, 7)}, "text embedding is 7 wide, this network takes 20"),
    "no pooled": ({}, {"pooled": None}, "pooled embedding is missing, this network takes 10"),
    "text batch": ({}, {"text": (4, 16, 20)}, "text has batch 4, the latent 2; make them equal"),
    "pooled batch": ({}, {"pooled": (3, 10)}, "pooled has batch 3, the latent 2"),
    "text_len": ({}, {"text_len": torch.tensor([0, 3])}, "text_len is 0 to 3, wanted 1 to 16 tokens"),
    "long text_len": ({}, {"text_len": torch.tensor([2, 17])}, "text_len is 2 to 17, wanted 1 to 16 tokens"),
    "guidance": (CONCAT, {"guidance": torch.ones(2)}, "guidance is given, but this network has no guidance embedding"),
}


@pytest.mark.parametrize(("changes", "wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input(changes: dict, wrong: dict, message: str):
    model = build(BASE | changes | {"num_layers": 1, "num_single_layers": 1}, seed=0)
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 4, 6))
    wrong = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in wrong.items()}
    x_t = wrong.pop("x_t", x_t)
    with pytest.raises(ValueError, match=f"^Hunyuan: {message}"):
        model(x_t, t, replace(cond, **wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size_t": 2}, "patch_size_t is 2; supported: 1"),
        ({"qk_norm": None}, "qk_norm: is null, wanted a text"),
        (
            {"image_condition_type": "clip"},
            "image_condition_type is 'clip'; supported: None, 'latent_concat', 'token_r",
        ),
        ({"rope_axes_dim": [4, 4, 6]}, r"rope_axes_dim is \[4, 4, 6\]; wanted three even .* attention_head_dim, 12"),
        ({"rope_axes_dim": [3, 3, 6]}, "wanted three even numbers"),
        ({"_class_name": "CogVideoX"}, "_class_name is 'CogVideoX'; supported: WanTransformer3DModel, HunyuanVideo"),
    ],
)
def test_unsupported_configuration(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build(BASE | changes)


@pytest.mark.parametrize("keep", [[], [5], [-1, 0]])
def test_bad_keep(keep: list[int]):
    model = build(BASE, seed=0)
    x_t, t, cond, _ = model.example_inputs(size=(1, 2, 2))
    for call in (lambda: model(x_t, t, cond, keep=keep), lambda: model.prune(keep)):
        with pytest.raises(ValueError, match="^keep: "):
            call()
    assert model.num_blocks == 5
