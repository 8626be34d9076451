"""The walk over HunyuanVideo's two kinds of blocks: streams against separate forwards, block calls, gradients."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from fastlightgen.models.base import Cond, Job, Stream
from fastlightgen.models.folder.weights import build
from fastlightgen.models.hunyuan.model import HunyuanModel

N = 5
CONFIG = {"_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 8}
CONFIG |= {"rope_axes_dim": [4, 2, 2], "in_channels": 4, "out_channels": 4, "text_embed_dim": 8}
CONFIG |= {"pooled_projection_dim": 6, "num_layers": 2, "num_single_layers": 3, "num_refiner_layers": 1}
MASKS = [list(keep) for size in range(1, N + 1) for keep in combinations(range(N), size)]
VARIANTS = pytest.mark.parametrize("kind", [None, "token_replace"])
PRUNED = [1, 2, 4]


def inputs(kind: str | None = None, dtype: torch.dtype = torch.float32):
    model = build(CONFIG | {"image_condition_type": kind}, seed=0).to(dtype)
    x_t, t, cond, null = model.example_inputs(batch=2, seed=3, size=(2, 4, 4))

    def to(v: Tensor) -> Tensor:
        return v.to(dtype) if v.is_floating_point() else v

    cond, null = replace(cond, text_len=torch.tensor([3, 9])), replace(null, text_len=torch.tensor([1, 16]))
    return model, to(x_t), t, cond.map(to), null.map(to)


def alone(model: HunyuanModel, x_t: Tensor, t: Tensor, cond: Cond, keep) -> Tensor:
    """Predict one stream block by block, without the walk."""
    tables = model.tables(x_t, t)
    prompt = model.prompt(cond, tables)
    state = model.embed(x_t, prompt)
    for i in range(N) if keep is None else sorted(keep):
        ((state,),) = model.blocks[i]([Job(state, [prompt], [True])], tables)
    return model.unembed(state, prompt, tables)


@VARIANTS
@torch.no_grad()
def test_every_mask_beside_the_full_path(kind):
    model, x_t, t, cond, _ = inputs(kind)
    full = alone(model, x_t, t, cond, None)
    for keep in MASKS:
        model.block_calls = 0
        v_pruned, v_full = model.walk(x_t, t, [Stream(cond, keep), Stream(cond)])
        assert torch.equal(v_full, full) and torch.equal(v_pruned, alone(model, x_t, t, cond, keep))
        prefix = next((i for i in range(N) if i not in keep), N)
        assert model.block_calls == N + len(keep) - prefix
        assert torch.equal(model(x_t, t, cond, keep=keep), v_pruned)


@VARIANTS
@torch.no_grad()
def test_all_masks_and_two_prompts_in_one_walk(kind):
    model, x_t, t, cond, null = inputs(kind)
    model.block_calls = 0
    streams = [Stream(c, keep) for c in (cond, null) for keep in MASKS]
    for s, v in zip(streams, model.walk(x_t, t, streams)):
        assert torch.equal(v, alone(model, x_t, t, s.cond, s.keep))
    assert model.block_calls == 2 * sum(2**i for i in range(N))  # two prompts share no calls, masks share prefixes


@torch.no_grad()
def test_a_block_is_one_module_call_and_reads_a_prompt_once():
    model, x_t, t, cond, null = inputs()
    visits, read = [], []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: visits.append((i, len(args[0]))))
        linear = block.norm1.linear if i < 2 else block.norm.linear
        linear.register_forward_pre_hook(lambda *_, i=i: read.append(i))
    model.walk(x_t, t, [Stream(cond, PRUNED), Stream(null, PRUNED), Stream(cond)])
    assert visits == [(0, 1), (1, 3), (2, 3), (3, 1), (4, 3)]
    assert [read.count(i) for i in range(N)] == [1, 2, 2, 1, 2]


def gradients(model: HunyuanModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@VARIANTS
@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_equal_those_of_separate_forwards(kind, flags: tuple[bool, bool]):
    model, x_t, t, cond, null = inputs(kind, torch.float64)
    out = model.walk(x_t, t, [Stream(cond, PRUNED, flags[0]), Stream(cond, None, flags[1]), Stream(null, PRUNED)])
    assert [v.requires_grad for v in out] == [*flags, False]
    weights = torch.linspace(-1, 1, x_t.numel(), dtype=torch.float64).view_as(x_t)

    def total(parts: list[Tensor]) -> Tensor:
        return sum((n * weights * v.square()).sum() for n, v, flag in zip((1, 2), parts, flags) if flag)

    walked = gradients(model, total(out))
    separate = gradients(model, total([alone(model, x_t, t, cond, keep) for keep in (PRUNED, None)]))
    assert walked.keys() == separate.keys()
    assert ("transformer_blocks.0.attn.to_q.weight" in walked) == flags[1]  # a dropped block gets no gradient
    scale = max(g.abs().max().item() for g in separate.values())  # the bias of keys has a gradient of 0 up to rounding
    for name, want in separate.items():
        torch.testing.assert_close(walked[name], want, rtol=1e-10, atol=1e-12 * scale)


@VARIANTS
@pytest.mark.parametrize("keep_attention", [0, 3])
def test_checkpointing_changes_no_bit(kind, keep_attention: int):
    model, x_t, t, cond, null = inputs(kind)
    streams = [Stream(cond, PRUNED, grad=True), Stream(cond, None, grad=True), Stream(null, PRUNED)]
    want = gradients(model, sum(v.square().sum() for v in model.walk(x_t, t, streams)))
    model.checkpointing, model.keep_attention = True, keep_attention
    got = gradients(model, sum(v.square().sum() for v in model.walk(x_t, t, streams)))
    assert all(torch.equal(got[name], g) for name, g in want.items()) and got.keys() == want.keys()


def test_checkpointing_keeps_the_tokens_once_per_block():
    model, x_t, t, cond, _ = inputs()
    tokens, text = 2 * 2 * 2, int(cond.text_len.max())
    sizes = {2 * n * 16 for n in (tokens, text, tokens + text)}  # image, text, or both in one sequence

    def kept(checkpointing: bool) -> list[int]:
        """The sizes of the distinct hidden tensors that autograd keeps."""
        model.checkpointing, found = checkpointing, {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: found.setdefault(x.data_ptr(), x), lambda x: x):
            model(x_t, t, cond)
        return [x.numel() for x in found.values() if x.numel() in sizes and x.dim() == 3]

    plain, few = kept(False), kept(True)
    # Image and text at two block boundaries, both in one tensor at three; embedding, refiner and head keep a few more.
    assert len(few) <= 2 * 2 + 3 + 8 < len(plain) / 2


def test_streams_without_gradient_leave_the_graph_where_they_fork():
    model, x_t, t, cond, _ = inputs()
    seen = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda _, args, i=i: seen.append(
                (i, [s.x.requires_grad for j in args[0] for s in (j.state, *j.state.others)])
            )
        )
    model.walk(x_t, t, [Stream(cond, [0, 2, 4], grad=True), Stream(cond)])
    assert seen[:2] == [(0, [True, True]), (1, [False, False])]  # image and text, shared up to the fork
    assert sorted(seen[2][1]) == [False, False, True, True]
    assert not model.walk(x_t, t, [Stream(cond)])[0].requires_grad
