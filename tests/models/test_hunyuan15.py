"""HunyuanVideo-1.5 against diffusers' HunyuanVideo15Transformer3DModel with equal random weights; bad inputs."""

import inspect
from dataclasses import fields, replace

import pytest
import torch
from helpers import counted_flops
from hunyuan15_cases import BASE, TASKS, network
from torch import Tensor

from fastlightgen.models.base import Cond, Stream
from fastlightgen.models.folder.weights import build, load_model, save_model
from fastlightgen.models.hunyuan15.config import Hunyuan15Cond, Hunyuan15Config
from fastlightgen.models.hunyuan15.model import Hunyuan15Model

ODD = {"num_attention_heads": 3, "attention_head_dim": 20, "rope_axes_dim": [4, 6, 10], "num_refiner_layers": 1}
ODD |= {"mlp_ratio": 2.5, "rope_theta": 100.0, "in_channels": 13, "out_channels": 6, "patch_size": 2}
CASES = {"three frames": ({}, (3, 3, 4)), "one frame": ({}, (1, 4, 4)), "odd": (ODD, (5, 4, 2))}
LENGTHS = {  # (of the prompt's 16 tokens, of the quoted words' 6)
    "padded": ([3, 11], [6, 2]),
    "one with quoted words": ([16, 9], [0, 4]),
    "no quoted words": ([4, 4], [0, 0]),
    "no padding": ([16, 16], [6, 6]),
}


def stock(model: Hunyuan15Model):
    """diffusers' class with the same configuration and weights."""
    diffusers = pytest.importorskip("diffusers")
    other = diffusers.HunyuanVideo15Transformer3DModel(**{k: v for k, v in model.config.items() if k != "_class_name"})
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()


def valid(text: Tensor, lengths: Tensor | None) -> Tensor:
    lengths = torch.full((len(text),), text.shape[1]) if lengths is None else lengths
    return (torch.arange(text.shape[1]) < lengths[:, None]).to(text.dtype)


def ask(other, x_t: Tensor, t: Tensor, cond: Hunyuan15Cond) -> Tensor:
    """diffusers' prediction, called as its pipelines call it: zeros stand for a picture that is not given."""
    frames, (rows, columns), size = x_t.shape[2], x_t.shape[3:], len(x_t)
    channels, width = other.config.in_channels - x_t.shape[1], other.config.image_embed_dim
    image = torch.zeros(size, channels, frames, rows, columns).to(x_t) if cond.image is None else cond.image
    shown = torch.zeros(size, 729, width).to(x_t) if cond.image_embeds is None else cond.image_embeds
    own, glyphs = valid(cond.text, cond.text_len), valid(cond.text_2, cond.text_2_len)
    second = {"encoder_hidden_states_2": cond.text_2, "encoder_attention_mask_2": glyphs}
    return other(torch.cat([x_t, image], 1), 1000 * t, cond.text, own, **second, image_embeds=shown).sample


def with_lengths(cond: Hunyuan15Cond, lengths: tuple[list[int], list[int]]) -> Hunyuan15Cond:
    return replace(cond, text_len=torch.tensor(lengths[0]), text_2_len=torch.tensor(lengths[1]))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("changes", "size"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_equals_diffusers(changes: dict, size: tuple[int, int, int], task: str, lengths):
    model = network(changes | TASKS[task])
    x_t, t, cond, null = model.example_inputs(batch=2, seed=2, size=size)
    assert (cond.image is None) == (cond.image_embeds is None) == (task == "t2v")
    other = stock(model)
    for time, prompt in [(t, cond), (torch.tensor([1.0, 1e-4]), null)]:
        prompt = with_lengths(prompt, lengths)
        got, want = model(x_t, time, prompt), ask(other, x_t, time, prompt)
        assert got.shape == x_t.shape and want.std() > 0.1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # float32 roundings through 4 blocks


@torch.no_grad()
def test_texts_without_lengths_count_whole():
    model = network(TASKS["i2v"])
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 3, 4))
    bare = replace(cond, text_len=None, text_2_len=None)
    torch.testing.assert_close(model(x_t, t, bare), ask(stock(model), x_t, t, bare), rtol=0, atol=1e-5)
    none = replace(bare, text_2=None)
    want = ask(stock(model), x_t, t, replace(bare, text_2_len=torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(model(x_t, t, none), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_condition_counts():
    model = network(TASKS["i2v"])
    x_t, t, cond, null = model.example_inputs(batch=2, size=(1, 4, 4))
    cond = with_lengths(cond, ([9, 4], [5, 1]))
    v = model(x_t, t, cond)
    changes = {
        "text": null.text,
        "text_len": cond.text_len + 1,
        "text_2": null.text_2,
        "text_2_len": cond.text_2_len + 1,
    }
    changes |= {"image": -cond.image, "image_embeds": cond.image_embeds.flip(0)}
    for name, other in changes.items():
        assert (model(x_t, t, replace(cond, **{name: other})) - v).abs().max() > 1e-3, name


def test_float64_gradients_of_every_weight_equal_diffusers():
    model = network(TASKS["i2v"]).double()
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 3, 4))
    cond = with_lengths(cond, LENGTHS["padded"])
    other, x_t = stock(model).double(), x_t.double()
    cond = cond.map(lambda x: x.double() if x.is_floating_point() else x)
    weight = torch.linspace(-1, 1, x_t.numel(), dtype=x_t.dtype).view_as(x_t)
    for out in (model(x_t, t, cond), ask(other, x_t, t.double(), cond)):
        (out * weight).sum().backward()
    for name, p in other.named_parameters():
        assert (p.grad is None) == (model.get_parameter(name).grad is None), name
        # diffusers embeds the time in float32, which limits the agreement.
        torch.testing.assert_close(model.get_parameter(name).grad, p.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_configuration_has_diffusers_fields_and_defaults():
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(diffusers.HunyuanVideo15Transformer3DModel.__init__).parameters
    ours = {f.name: f.default for f in fields(Hunyuan15Config) if f.name != "kept_attention_heads"}  # of width pruning
    assert ours == {k: p.default for k, p in theirs.items() if k != "self"}


def test_blocks_cost_what_torch_counts():
    for task in TASKS.values():
        model = network(task)
        x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 4, 6))
        cond = replace(cond, text_len=None, text_2_len=None)
        assert model.block_flops(x_t, cond) == counted_flops(model, x_t, t, cond)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_walk_equals_independent_forwards_bit_for_bit(task: str, checkpointing: bool):
    model = network(TASKS[task])
    model.checkpointing, keep = checkpointing, [0, 2, 3]
    x_t, t, cond, null = model.example_inputs(batch=2, size=(2, 3, 4))
    cond, null = with_lengths(cond, ([3, 9], [0, 5])), with_lengths(null, ([1, 16], [0, 0]))
    streams = [Stream(cond, keep, grad=True), Stream(null, keep), Stream(cond), Stream(null, [1])]
    model.block_calls = 0
    found = model.walk(x_t, t, streams)
    # cond: one prefix, then 4 + 2 calls after the fork at block 1; null: its two masks differ from block 0 on.
    assert model.block_calls == (1 + 3 + 2) + (3 + 1)
    for v, stream in zip(found, streams, strict=True):
        assert torch.equal(v, model(x_t, t, stream.cond, stream.keep)) and v.requires_grad == stream.grad


@torch.no_grad()
@pytest.mark.parametrize("keep", [[0, 2], [3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_prune_equals_skipping_bit_for_bit(task: str, keep: list[int]):
    model = network(TASKS[task])
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(3, 3, 4))
    skipped = model(x_t, t, cond, keep=keep)
    assert (skipped - model(x_t, t, cond)).abs().max() > 1e-3 or len(keep) == 4
    pruned = model.prune(keep[::-1])  # the order of `keep` does not matter
    assert pruned is model and model.config["num_layers"] == model.num_blocks == len(keep)
    assert torch.equal(model(x_t, t, cond), skipped)
    torch.testing.assert_close(ask(stock(model), x_t, t, cond), skipped, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pruned_folder_loads_in_stock_diffusers(tmp_path):
    theirs = pytest.importorskip("diffusers").HunyuanVideo15Transformer3DModel
    pytest.importorskip("accelerate", reason="diffusers needs accelerate for from_pretrained")
    model = network(TASKS["i2v"])
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(3, 4, 4))
    skipped = model(x_t, t, cond, keep=[1, 2])
    folder = save_model(model.prune([1, 2]), tmp_path / "m")
    other, report = theirs.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and len(other.transformer_blocks) == 2
    torch.testing.assert_close(ask(other.eval(), x_t, t, cond), skipped, rtol=0, atol=1e-5)
    assert torch.equal(load_model(folder)(x_t, t, cond), skipped)


@torch.no_grad()
def test_a_plain_condition_has_no_second_text():
    """The built-in world makes it, with a pooled text, which this network does not read."""
    model = network(TASKS["t2v"])
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 3, 4))
    plain = Cond(cond.text, cond.text_len, pooled=torch.ones(2, 5))
    want = ask(stock(model), x_t, t, replace(cond, text_2_len=torch.zeros(2, dtype=torch.long)))
    torch.testing.assert_close(model(x_t, t, plain), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_time_as_a_number_and_a_single_condition_are_broadcast():
    model = network(TASKS["i2v"])
    x_t, _, cond, _ = model.example_inputs(batch=2, size=(2, 4, 4))
    one = replace(cond, **{k: v[:1] for k, v in vars(cond).items() if v is not None and k != "image"})
    both = replace(one, **{k: v.expand(2, *v.shape[1:]) for k, v in vars(one).items() if v is not None})
    want = ask(stock(model), x_t, torch.tensor([0.25, 0.25]), both)
    torch.testing.assert_close(model(x_t, 0.25, one), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_errs_no_more_than_diffusers_in_bfloat16():
    model = network(TASKS["i2v"])
    x_t, _, cond, _ = model.example_inputs(batch=2, size=(3, 4, 6))
    t = torch.tensor([0.5, 0.25])  # 500 and 250 are exact in bfloat16, to which diffusers' pipelines round the time
    low, x_t = stock(model).bfloat16(), x_t.bfloat16()
    cond = cond.map(lambda v: v.bfloat16() if v.is_floating_point() else v)
    wide = cond.map(lambda v: v.double() if v.is_floating_point() else v)
    exact = ask(stock(model).double(), x_t.double(), t.double(), wide)
    theirs = ask(low, x_t, t.bfloat16(), cond).double() - exact
    ours = model.bfloat16()(x_t, t, cond).double() - exact
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt()


BAD = {  # name -> (changes of the inputs, message)
    "channels": ({"x_t": (2, 5, 2, 4, 6)}, r"38 channels \(latent \+ condition\), this network takes 65"),
    "image channels": ({"image": (2, 32, 2, 4, 6)}, r"64 channels \(latent \+ condition\), this network takes 65"),
    "image frames": ({"image": (2, 33, 1, 4, 6)}, r"image is \(2, 33, 1, 4, 6\), the latent \(2, 32, 2, 4"),
    "text width": ({"text": (2, 16, 7)}, "text embedding is 7 wide, this network takes 20"),
    "glyph width": ({"text_2": (2, 6, 7)}, "text_2 embedding is 7 wide, this network takes 14"),
    "picture width": ({"image_embeds": (2, 6, 7)}, "image_embeds embedding is 7 wide, this network takes 10"),
    "text batch": ({"text": (4, 16, 20)}, "text has batch 4, the latent 2; make them equal"),
    "picture batch": ({"image_embeds": (3, 6, 10)}, "image_embeds has batch 3, the latent 2"),
    "text_len": ({"text_len": torch.tensor([0, 3])}, "text_len is 0 to 3, wanted 1 to 16 tokens"),
    "long text_2_len": ({"text_2_len": torch.tensor([2, 7])}, "text_2_len is 2 to 7, wanted 0 to 6 tokens"),
    "guidance": ({"guidance": torch.ones(2)}, "guidance is given, but this network reads none"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD.values(), ids=BAD)
def test_bad_input(wrong: dict, message: str):
    model = build(BASE | {"num_layers": 1}, seed=0)
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(2, 4, 6))
    wrong = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in wrong.items()}
    x_t = wrong.pop("x_t", x_t)
    with pytest.raises(ValueError, match=f"^HunyuanVideo-1.5: {message}"):
        model(x_t, t, replace(cond, **wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size_t": 2}, "HunyuanVideo-1.5 config: patch_size_t is 2; supported: 1"),
        ({"task_type": "v2v"}, "task_type is 'v2v'; supported: 't2v', 'i2v'"),
        ({"use_meanflow": True}, "use_meanflow is true: a step-distilled or super-resolution network, which reads"),
        ({"in_channels": 98}, "in_channels is 98; wanted 65: latent, first frame and mask"),
        ({"rope_axes_dim": [4, 4, 6]}, r"rope_axes_dim is \[4, 4, 6\]; wanted three even .* attention_head_dim, 12"),
        ({"guidance_embeds": True}, "guidance_embeds=true is not a key of this network"),
    ],
)
def test_unsupported_configuration(changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        build(BASE | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [[], [4], [-1, 0]])
def test_bad_keep(keep: list[int]):
    model = build(BASE, seed=0)
    x_t, t, cond, _ = model.example_inputs(size=(1, 2, 2))
    for call in (lambda: model(x_t, t, cond, keep=keep), lambda: model.prune(keep)):
        with pytest.raises(ValueError, match="^keep: "):
            call()
    assert model.num_blocks == 4
