"""A flat call passes every tensor through an engine's hooks, and computes with the tensors that the hooks return."""

import pytest
import torch
from torch import Tensor

from fastlightgen.models.base import Job
from fastlightgen.models.folder.weights import build
from fastlightgen.models.plumbing import flat_call, tensors_of, with_tensors

WAN = {"num_attention_heads": 2, "attention_head_dim": 6, "in_channels": 4, "out_channels": 4, "text_dim": 8}
WAN |= {"freq_dim": 8, "ffn_dim": 16, "num_layers": 2}
HUNYUAN = {"_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 8}
HUNYUAN |= {"rope_axes_dim": [4, 2, 2], "in_channels": 4, "out_channels": 4, "text_embed_dim": 8, "num_layers": 1}
HUNYUAN |= {"pooled_projection_dim": 6, "num_single_layers": 1, "num_refiner_layers": 1}


@pytest.fixture(params=[WAN, HUNYUAN], ids=["wan", "hunyuan"])
def call(request):
    """(block, jobs, tables) of a network's first block with two prompts."""
    model = build(request.param, seed=0)
    x_t, t, *conds = model.example_inputs(batch=2, size=(2, 4, 4))
    tables = model.tables(x_t, t)
    prompts = [model.prompt(cond, tables) for cond in conds]
    return model.blocks[0], [Job(model.embed(x_t, p), [p], [True]) for p in prompts], tables


def test_the_call_takes_and_returns_its_tensors_one_by_one(call):
    block, jobs, tables = call
    seen = {}
    block.register_forward_hook(lambda _, args, out: seen.update(args=args, out=out))
    states = flat_call(block, jobs, tables, None)
    given = [a for a in seen["args"] if isinstance(a, Tensor)]
    assert {id(a) for a in given} == {id(a) for a in tensors_of((jobs, tables))}
    assert {id(jobs[0].state.x), id(jobs[1].prompts[0].text), id(tables.rope[2])} <= {id(a) for a in given}
    assert not {id(a) for a in given} & {id(job.prompts[0].cond.text) for job in jobs}  # a condition is the caller's
    assert isinstance(seen["out"], tuple) and [id(v) for v in seen["out"]] == [id(v) for v in tensors_of(states)]
    plain = block(jobs, tables)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(states), tensors_of(plain), strict=True))


def test_a_hook_may_replace_what_goes_in_and_what_comes_out(call):
    block, jobs, tables = call
    want = tensors_of(flat_call(block, jobs, tables, None))
    x = jobs[0].state.x
    own = x.detach().clone().requires_grad_()
    block.register_forward_pre_hook(lambda _, args: tuple(own if a is x else a for a in args))
    block.register_forward_hook(lambda _, args, out: tuple(v + 1 for v in out))
    got = tensors_of(flat_call(block, jobs, tables, None))
    assert all(torch.equal(a, b + 1) for a, b in zip(got, want, strict=True))
    got[0].sum().backward()
    assert own.grad is not None and own.grad.abs().sum() > 0


def test_a_shared_tensor_stays_shared(call):
    _, jobs, tables = call
    value = [jobs[0], Job(jobs[0].state, *[[]] * 2)]
    copy = with_tensors(value, [v.clone() for v in tensors_of(value)])
    assert copy[0].state.x is copy[1].state.x is not jobs[0].state.x
    assert copy[0].prompts[0].cond is jobs[0].prompts[0].cond
    assert with_tensors(value, tensors_of(value)) is value  # nothing to replace, nothing copied
    assert with_tensors(tables, [v + 1 for v in tensors_of(tables)]).grid == tables.grid
