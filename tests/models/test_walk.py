"""The walk: every stream equals a separate forward bit for bit; number of block calls; gradients and graphs."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fastlightgen.models.base import Cond, Job, Stream
from fastlightgen.models.folder.weights import build
from fastlightgen.models.wan.model import WanModel

N = 6
CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": N,
}
MASKS = [list(keep) for size in range(1, N + 1) for keep in combinations(range(N), size)]
PRUNED = [0, 1, 4, 5]


def inputs(dtype: torch.dtype = torch.float32):
    model = build(CONFIG, seed=0).to(dtype)
    x_t, t, cond, null = model.example_inputs(batch=2, size=(2, 4, 4))
    return model, x_t.to(dtype), t, cond.map(lambda v: v.to(dtype)), null.map(lambda v: v.to(dtype))


def alone(model: WanModel, x_t: Tensor, t: Tensor, cond: Cond, keep) -> Tensor:
    """Predict one stream block by block, without the walk."""
    tables = model.tables(x_t, t)
    prompt = model.prompt(cond, tables)
    state = model.embed(x_t, prompt)
    for i in range(model.num_blocks) if keep is None else sorted(keep):
        ((state,),) = model.blocks[i]([Job(state, [prompt], [True])], tables)
    return model.unembed(state, prompt, tables)


@torch.no_grad()
def test_every_mask_beside_the_full_path():
    model, x_t, t, cond, _ = inputs()
    full = alone(model, x_t, t, cond, None)
    for keep in MASKS:
        model.block_calls = 0
        v_pruned, v_full = model.walk(x_t, t, [Stream(cond, keep), Stream(cond)])
        assert torch.equal(v_full, full) and torch.equal(v_pruned, alone(model, x_t, t, cond, keep))
        # The paths split at the first dropped block p: N + K - p calls (N if no block is dropped).
        prefix = next((i for i in range(N) if i not in keep), N)
        assert model.block_calls == N + len(keep) - prefix
        assert torch.equal(model(x_t, t, cond, keep=keep), v_pruned)


@torch.no_grad()
def test_all_masks_in_one_walk():
    model, x_t, t, cond, _ = inputs()
    model.block_calls = 0
    for keep, v in zip(MASKS, model.walk(x_t, t, [Stream(cond, keep) for keep in MASKS])):
        assert torch.equal(v, alone(model, x_t, t, cond, keep))
    # A tree: block i is called once for each of the 2^i subsets of the blocks before it.
    assert model.block_calls == sum(2**i for i in range(N))


@torch.no_grad()
def test_the_three_streams_of_the_teacher():
    model, x_t, t, cond, null = inputs()
    model.block_calls = 0
    v_pc, v_pn, v_uc = model.walk(x_t, t, [Stream(cond, PRUNED), Stream(null, PRUNED), Stream(cond)])
    assert torch.equal(v_pc, alone(model, x_t, t, cond, PRUNED))
    assert torch.equal(v_pn, alone(model, x_t, t, null, PRUNED))
    assert torch.equal(v_uc, alone(model, x_t, t, cond, None))
    assert model.block_calls == (N + 4 - 2) + 4  # different prompts share no calls


@torch.no_grad()
def test_the_sweep_of_stage_1_shares_prefixes():
    model, x_t, t, cond, _ = inputs()
    skips = [[j for j in range(N) if j != i] for i in range(N)]
    for streams, calls in (
        ([Stream(cond, keep) for keep in skips] + [Stream(cond)], N * (N + 1) // 2),  # trunk N, tails N - 1, ..., 0
        ([Stream(cond, keep) for keep in skips], N * (N + 1) // 2 - 1),  # no stream needs the trunk's last block
    ):
        model.block_calls = 0
        out = model.walk(x_t, t, streams)
        assert model.block_calls == calls
        assert all(torch.equal(v, alone(model, x_t, t, cond, s.keep)) for v, s in zip(out, streams))


@torch.no_grad()
def test_one_module_call_per_block_serves_all_streams():
    model, x_t, t, cond, null = inputs()
    visits = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: visits.append((i, len(args[0]))))
    model.walk(x_t, t, [Stream(cond, PRUNED), Stream(null, [1, 2, 4]), Stream(cond)])
    # Block 0 has one job, because the null stream skips it. From block 1 on that stream's prompt separates it.
    assert visits == [(0, 1), (1, 2), (2, 2), (3, 1), (4, 3), (5, 2)]


@torch.no_grad()
def test_prompts_share_everything_before_text_enters():
    model, x_t, t, cond, null = inputs()
    queries, keys = [], []
    for i, block in enumerate(model.blocks):
        block.attn1.to_q.register_forward_pre_hook(lambda *_, i=i: queries.append(i))
        block.attn2.to_k.register_forward_pre_hook(lambda *_, i=i: keys.append(i))
    streams = [Stream(cond, PRUNED), Stream(null, PRUNED), Stream(cond)]
    out = model.walk(x_t, t, streams)
    assert queries.count(0) == 1 and queries.count(1) == 2  # block 0's self-attention serves both prompts
    assert all(keys.count(i) == 2 for i in PRUNED)  # text keys once per prompt, though block 4 runs three streams
    assert all(torch.equal(v, alone(model, x_t, t, s.cond, s.keep)) for v, s in zip(out, streams))


@torch.no_grad()
def test_the_null_prompts_keys_are_kept_for_a_frozen_network():
    model, x_t, t, cond, null = inputs()
    null = Cond(null.text[:1].expand(2, -1, -1))
    want, counted = model(x_t, t, null, keep=PRUNED), []
    for block in model.blocks:
        block.attn2.to_k.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    text_keys = {}
    for _ in range(3):
        v_c, v_n = model.walk(x_t, t, [Stream(cond, PRUNED), Stream(null, PRUNED, text_keys=text_keys)])
        # Computed from one row instead of the batch: another kernel sums the same products in another order.
        torch.testing.assert_close(v_n, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(v_c, alone(model, x_t, t, cond, PRUNED))
    assert counted.count(1) == len(PRUNED) == len(text_keys)  # once in three walks


@pytest.mark.parametrize("keep_attention", [0, 2, N])
def test_checkpointing_changes_no_bit(keep_attention: int):
    model, x_t, t, cond, null = inputs()
    streams = [Stream(cond, PRUNED, grad=True), Stream(cond, None, grad=True), Stream(null, PRUNED)]
    want = gradients(model, sum(v.square().sum() for v in model.walk(x_t, t, streams)))
    model.checkpointing, model.keep_attention = True, keep_attention
    got = gradients(model, sum(v.square().sum() for v in model.walk(x_t, t, streams)))
    assert all(torch.equal(got[name], g) for name, g in want.items()) and got.keys() == want.keys()


def test_checkpointing_keeps_one_hidden_tensor_per_block():
    model, x_t, t, cond, _ = inputs()
    hidden = model.hidden_bytes(x_t) // 4

    def kept(keep_attention: int | None) -> int:
        """The number of distinct tensors of a hidden state's size that autograd keeps."""
        model.checkpointing, model.keep_attention = keep_attention is not None, keep_attention or 0
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: found.setdefault(x.data_ptr(), x), lambda x: x):
            model(x_t, t, cond)
        return sum(x.numel() == hidden for x in found.values())

    plain, none = kept(None), kept(0)
    assert none <= N + 2 < plain / 3  # block boundaries, and one each for embedding and head


@torch.no_grad()
def test_texts_of_different_lengths_and_a_stream_given_twice():
    model, x_t, t, cond, null = inputs()
    short = Cond(null.text[:, :3])
    out = model.walk(x_t, t, [Stream(cond, PRUNED), Stream(short), Stream(cond, PRUNED)])
    assert torch.equal(out[1], alone(model, x_t, t, short, None))
    assert torch.equal(out[0], out[2]) and torch.equal(out[0], alone(model, x_t, t, cond, PRUNED))


def test_a_stream_of_another_batch_is_refused():
    model, x_t, t, cond, null = inputs()
    with pytest.raises(ValueError, match="text has batch 3, the latent 2"):
        model.walk(x_t, t, [Stream(cond), Stream(Cond(null.text[:1].expand(3, -1, -1)))])


def gradients(model: WanModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_equal_those_of_separate_forwards(flags: tuple[bool, bool]):
    model, x_t, t, cond, null = inputs(torch.float64)
    out = model.walk(x_t, t, [Stream(cond, PRUNED, flags[0]), Stream(cond, None, flags[1]), Stream(null, PRUNED)])
    assert [v.requires_grad for v in out] == [*flags, False]
    weights = torch.linspace(-1, 1, x_t.numel(), dtype=torch.float64).view_as(x_t)

    def total(parts: list[Tensor]) -> Tensor:
        return sum((n * weights * v.square()).sum() for n, v, flag in zip((1, 2), parts, flags) if flag)

    walked = gradients(model, total(out))
    separate = gradients(model, total([alone(model, x_t, t, cond, keep) for keep in (PRUNED, None)]))
    assert walked.keys() == separate.keys()
    assert ("blocks.2.attn1.to_q.weight" in walked) == flags[1]  # a dropped block gets no gradient
    for name, want in separate.items():
        torch.testing.assert_close(walked[name], want, rtol=1e-10, atol=1e-10 * want.abs().max().item())


def test_gradient_through_x_t_reaches_grad_streams_only():
    model, x_t, t, cond, _ = inputs(torch.float64)
    x_t.requires_grad_()
    v_p, v_u = model.walk(x_t, t, [Stream(cond, PRUNED, grad=True), Stream(cond)])
    (walked,) = torch.autograd.grad(v_p.sum(), x_t)
    (want,) = torch.autograd.grad(alone(model, x_t, t, cond, PRUNED).sum(), x_t)
    torch.testing.assert_close(walked, want, rtol=1e-10, atol=1e-10)
    assert not v_u.requires_grad


def test_a_stream_without_gradient_leaves_the_graph_where_it_forks():
    model, x_t, t, cond, _ = inputs()
    seen = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda _, args, i=i: seen.append((i, [j.state.x.requires_grad for j in args[0]]))
        )
    model.walk(x_t, t, [Stream(cond, PRUNED, grad=True), Stream(cond)])
    # One group with gradient up to the fork; blocks 2 and 3 run only for the stream without gradient.
    assert seen[:4] == [(0, [True]), (1, [True]), (2, [False]), (3, [False])]
    assert [sorted(flags) for _, flags in seen[4:]] == [[False, True]] * 2
    twins = model.walk(x_t, t, [Stream(cond, PRUNED, grad=True), Stream(cond, PRUNED)])  # merged to the end
    assert [v.requires_grad for v in twins] == [True, False] and torch.equal(*twins)


def saved(run) -> int:
    """The number of tensors that autograd keeps for a backward pass through run()."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(1) or x, lambda x: x):
        out = run()
    del out
    return len(kept)


def test_streams_without_gradient_keep_nothing():
    model, x_t, t, cond, null = inputs()
    one = saved(lambda: model(x_t, t, cond, keep=PRUNED))
    streams = [Stream(cond, PRUNED, grad=True), Stream(cond), Stream(null), Stream(null, [3])]
    assert one > 0 and saved(lambda: model.walk(x_t, t, streams)) == one
    assert saved(lambda: model.walk(x_t, t, streams[1:])) == 0
    with torch.no_grad():  # the caller's grad mode overrides grad=True
        assert not model.walk(x_t, t, streams)[0].requires_grad
