"""LoRA: new adapters change nothing, only adapters learn, they equal weights W + B A, and `lora_on` restores them."""

import pytest
import torch
from torch import nn

from fastlightgen.models.folder.weights import build
from fastlightgen.models.lora import LoraLinear, attach_lora, lora_on

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
CONFIG |= {"num_layers": 3}
RANK = 3


def attached(seed: int = 0):
    model = build(CONFIG, seed=1).double()
    adapters = attach_lora(model, RANK, torch.Generator().manual_seed(seed))
    x_t, t, cond, _ = model.example_inputs(batch=2, size=(1, 4, 4))
    return model, adapters, (x_t.double(), t, cond.map(lambda v: v.double()))


def shake(adapters: nn.ParameterDict) -> None:
    gen = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in adapters.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=gen))


def test_nothing_changes_at_the_start():
    model, adapters, args = attached()
    want = build(CONFIG, seed=1).double()(*args)
    assert torch.equal(model(*args), want)
    with lora_on(model):
        assert torch.equal(model(*args), want)
    assert all(p.any() for k, p in adapters.items() if k.endswith("_down"))  # B is zero, A is not


def test_which_layers_are_wrapped():
    model, adapters, _ = attached()
    dim, ffn = 24, 40
    per_block = 8 * (dim + dim) + 2 * (dim + ffn)  # q, k, v, out of two attentions; up and down of the feed-forward
    assert sum(p.numel() for p in adapters.values()) == RANK * per_block * 3 and len(adapters) == 2 * 10 * 3
    assert not any(isinstance(m, LoraLinear) for name, m in model.named_modules() if not name.startswith("blocks"))


def test_only_the_adapters_learn():
    model, adapters, args = attached()
    shake(adapters)
    with lora_on(model):
        model(*args).square().sum().backward()
    own = {id(p) for p in adapters.values()}
    assert all((p.grad is not None) == p.requires_grad == (id(p) in own) for p in model.parameters())
    assert all(p.grad.any() for p in adapters.values())


def test_adapters_equal_merged_weights():
    model, adapters, args = attached()
    shake(adapters)
    plain = model(*args)
    merged = build(CONFIG, seed=1).double()
    with torch.no_grad():
        for name, m in merged.blocks.named_modules():
            if isinstance(m, nn.Linear):
                key = name.replace(".", "_")
                m.weight += adapters[f"{key}_up"] @ adapters[f"{key}_down"]
        with lora_on(model):
            got = model(*args)
        torch.testing.assert_close(got, merged(*args))
    assert torch.equal(plain, build(CONFIG, seed=1).double()(*args)) and (got - plain).abs().max() > 1e-3


def test_scope_restores_after_errors_and_nests():
    model, adapters, args = attached()
    shake(adapters)
    off = model(*args)
    with pytest.raises(RuntimeError, match="stop"), lora_on(model):
        raise RuntimeError("stop")
    assert torch.equal(model(*args), off)
    with lora_on(model):
        on = model(*args)
        with lora_on(model):
            pass
        assert torch.equal(model(*args), on) and not torch.equal(on, off)
    assert torch.equal(model(*args), off)


def test_start_is_a_function_of_the_generator():
    a, b, c = (attached(seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("kept", [0, 3])
def test_a_block_is_computed_again_with_its_adapters(kept):
    """A backward pass after `lora_on` recomputes with the adapters on, and leaves them off."""
    gradients = []
    for checkpointing in (False, True):
        model, adapters, args = attached()
        shake(adapters)
        model.checkpointing, model.keep_attention = checkpointing, kept
        with lora_on(model):
            out = model(*args)
        out.square().sum().backward()
        assert not any(m.on for m in model.modules() if isinstance(m, LoraLinear))
        gradients.append({name: p.grad for name, p in adapters.items() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and any(g.any() for g in plain.values())
    for name, grad in plain.items():  # the same operations on the same numbers
        assert torch.equal(again[name], grad), name
