"""fp8=frozen: which layers it takes, that streams with gradient keep their bits, when weights are rounded again."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import small_hunyuan, small_wan
from torch import nn

from fastlightgen.engine.ema import Ema
from fastlightgen.models.base import Stream, VideoDiT
from fastlightgen.models.float8 import Float8Linear, in_float8
from fastlightgen.models.lora import attach_lora, lora_on
from fastlightgen.ops import float8

KEEP = [0, 3]
NETS: dict[str, Callable[[], VideoDiT]] = {"wan": small_wan, "hunyuan": small_hunyuan}


def example(model: VideoDiT):
    return model.example_inputs(batch=2, size=(1, 4, 4))


def replaced(model: VideoDiT) -> set[str]:
    """Names of the layers in float8, without the numbers of their blocks."""
    names = [name for name, m in model.named_modules() if isinstance(m, Float8Linear)]
    return {".".join(name.split(".")[2:]) for name in names}


def test_which_layers_of_wan():
    """The feed-forward is 24 wide, which is no multiple of 16; everything outside the blocks stays."""
    model = in_float8(small_wan())
    attention = {f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert replaced(model) == attention
    assert all(name.startswith("blocks.") for name, m in model.named_modules() if isinstance(m, Float8Linear))


def test_which_layers_of_hunyuan():
    """The modulation layers stay. An image and a text have layers of their own in a double block."""
    model = in_float8(small_hunyuan())
    own = {f"attn.{name}" for name in ("to_q", "to_k", "to_v")}
    double = {*own, "attn.to_out.0", *(f"attn.add_{n}_proj" for n in "qkv"), "attn.to_add_out"}
    double |= {f"{ff}.net.{i}" for ff in ("ff", "ff_context") for i in ("0.proj", "2")}
    assert replaced(model) == double | own | {"proj_mlp", "proj_out"}
    stays = [
        m for b in model.blocks for name, m in b.named_modules() if name.endswith("norm.linear") or "norm1" in name
    ]
    assert stays and not any(isinstance(m, Float8Linear) for m in stays)


@pytest.mark.parametrize("net", NETS)
def test_parameters_and_names_stay(net):
    plain, model = NETS[net](), NETS[net]()
    own = dict(model.named_parameters())
    in_float8(model)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert all(p is own[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_with_gradient_the_bits_stay(net, checkpointing):
    """In one walk of streams with and without gradient, under recomputation too."""
    out = []
    for change in (lambda m: m, in_float8):
        model = change(NETS[net]())
        model.checkpointing = checkpointing
        x_t, t, cond, null = example(model)
        streams = [Stream(cond, KEEP, grad=True), Stream(cond), Stream(null, KEEP)]
        v = model.walk(x_t, t, streams)
        v[0].square().sum().backward()
        out.append((v, [p.grad for p in model.parameters()]))
    (plain, grads), (v, grads_8) = out
    assert torch.equal(plain[0], v[0]) and v[0].requires_grad
    assert any(g is not None for g in grads)
    for a, b in zip(grads, grads_8, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip(plain[1:], v[1:], strict=True):  # the others are in float8 after the blocks that they share
        assert 0 < float((a - b).norm() / a.norm()) < 0.1 and not b.requires_grad


@pytest.mark.parametrize("net", NETS)
def test_without_gradient_it_is_the_product_of_rounded_factors(net):
    """The walk against the same walk with layers that round both factors in float64."""

    class Rounded(Float8Linear):
        def forward(self, x):
            def rounded(v):
                scale = v.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
                return (v / scale).to(torch.float8_e4m3fn).double() * scale.double()

            return (rounded(x) @ rounded(self.weight).mT + self.bias.double()).to(x.dtype)

    model, other = in_float8(NETS[net]()), in_float8(NETS[net]())
    for m in other.modules():
        if isinstance(m, Float8Linear):
            m.__class__ = Rounded
    x_t, t, cond, _ = example(model)
    with torch.no_grad():
        v, plain = model(x_t, t, cond), NETS[net]()(x_t, t, cond)
        # A sum in another order may round a hidden state to the neighbour, so compare with the error of float8.
        assert float((v - other(x_t, t, cond)).norm()) < 0.2 * float((v - plain).norm())


@pytest.fixture
def rounded(monkeypatch) -> Counter:
    """How often each weight was rounded, by its address."""
    seen: Counter = Counter()
    own = float8.quantised

    def noted(x):
        if isinstance(x, nn.Parameter):
            seen[x.data_ptr()] += 1
        return own(x)

    monkeypatch.setattr(float8, "quantised", noted)
    return seen


def layers(model: VideoDiT) -> int:
    return sum(isinstance(m, Float8Linear) for m in model.modules())


def test_frozen_weights_are_rounded_once(rounded):
    model = in_float8(small_wan()).requires_grad_(False)
    x_t, t, cond, null = example(model)
    for _ in range(3):
        with torch.no_grad():
            model.walk(x_t, t, [Stream(cond), Stream(null, KEEP)])
    assert len(rounded) == layers(model) and set(rounded.values()) == {1}


def test_a_students_weights_are_rounded_after_each_update(rounded):
    model = in_float8(small_wan())
    x_t, t, cond, _ = example(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = None
    for update in range(1, 4):
        for _ in range(2):  # two steps of a rollout
            with torch.no_grad():
                v = model(x_t, t, cond)
        assert set(rounded.values()) == {update}
        assert before is None or not torch.equal(v, before)
        before = v
        model(x_t, t, cond).square().sum().backward()
        optimizer.step()
    fresh = in_float8(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(model(x_t, t, cond), fresh(x_t, t, cond))


def test_averages_loaded_weights_and_copies_are_seen():
    model = in_float8(small_wan())
    x_t, t, cond, _ = example(model)
    ema = Ema(model, 0.9, 0)
    with torch.no_grad():
        first = model(x_t, t, cond)
        for p in model.parameters():
            p.mul_(1.1)
        second = model(x_t, t, cond)
        ema.swap(model)
        assert torch.equal(model(x_t, t, cond), first)
        ema.swap(model)
        assert torch.equal(model(x_t, t, cond), second) and not torch.equal(first, second)
        model.load_state_dict(small_wan().state_dict())
        assert torch.equal(model(x_t, t, cond), first)
        other = copy.deepcopy(model)
        other.blocks[0].attn1.to_q.weight.mul_(2)
        assert not torch.equal(other(x_t, t, cond), first) and torch.equal(model(x_t, t, cond), first)


def test_gathered_weights_are_rounded_in_every_call(rounded):
    model = in_float8(small_wan(), keeps=False)
    x_t, t, cond, _ = example(model)
    with torch.no_grad():
        v = [model(x_t, t, cond) for _ in range(2)]
        assert torch.equal(v[0], v[1]) and set(rounded.values()) == {2}
        assert torch.equal(v[0], in_float8(small_wan())(x_t, t, cond))
    assert not any(m.made for m in model.modules() if isinstance(m, Float8Linear))


def test_adapters_on_a_frozen_network(rounded):
    """Its weights are rounded once; the adapters keep their type and change the prediction at once."""
    model = in_float8(small_wan())
    adapters = attach_lora(model, 2, torch.Generator().manual_seed(0))
    x_t, t, cond, _ = example(model)
    with lora_on(model):
        with torch.no_grad():
            before = model(x_t, t, cond)
            for p in adapters.values():
                p.add_(0.1)
            after = model(x_t, t, cond)
        model(x_t, t, cond).square().sum().backward()
    assert not torch.equal(before, after) and set(rounded.values()) == {1} and len(rounded) == layers(model)
    plain = small_wan()
    theirs = attach_lora(plain, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in theirs.values():
            p.add_(0.1)
    with lora_on(plain):
        plain(x_t, t, cond).square().sum().backward()
    assert all(torch.equal(adapters[name].grad, p.grad) for name, p in theirs.items())


def test_autocast_decides_the_type_of_the_result():
    model = in_float8(small_wan())
    layer, x = model.blocks[0].attn1.to_q, torch.randn(2, 3, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer(x).dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16
