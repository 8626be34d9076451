"""Scores of single blocks: magnitude by hand, Taylor against finite differences, attention by explicit sums."""

import copy

import pytest
import torch
from helpers import batches, config, small_hunyuan, small_wan

from fastlightgen.config import ConfigError
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import save_model
from fastlightgen.planner.step import step_cost
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.rank import build, rank, walks
from fastlightgen.stages.scores import evaluation_set, l2, taylor

WORDS = ["clips=3", "timesteps=2", "batch=2"]


def test_the_magnitude_by_hand():
    net = small_wan().double()
    wanted = [sum((p * p).sum().item() for p in block.parameters()) for block in net.blocks]
    assert l2(net).tolist() == pytest.approx(wanted, rel=1e-12)


def test_taylor_is_the_derivative_by_a_block_s_scale():
    """sum_w w dL/dw is dL/ds at s = 1 for a block's parameters times s: here by central differences, in float64."""
    cfg, net = config(1, *WORDS), small_wan().double().requires_grad_(False)
    samples = list(evaluation_set(cfg, batches(2, torch.float64)))

    @torch.no_grad()
    def loss(i: int, scale: float) -> float:
        scaled = copy.deepcopy(net)
        for p in scaled.blocks[i].parameters():
            p *= scale
        errors = [(x_t - t.view(-1, 1, 1, 1, 1) * scaled(x_t, t, cond) - x0) for x_t, t, x0, cond in samples]
        return torch.cat([e.square().flatten(1).mean(1) for e in errors]).mean().item()

    h = 1e-3
    wanted = [abs(loss(i, 1 + h) - loss(i, 1 - h)) / (2 * h) for i in range(4)]
    # The score rounds predictions to float32; the differences have an error of h^2.
    assert taylor(net, samples).tolist() == pytest.approx(wanted, rel=1e-3)
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def explicit(net, batch, clip: int, k: int) -> list[float]:
    """The attention between frames of each block, by the sums of its softmax, at stratum k of 2 times of one clip.

    A clip has 2 frames of 4 tokens each. Text, if the block's keys have it, stands behind them.
    """
    gen = generator(0, 1, 2 * (clip // 2), k)  # draws for the batch that the clip is in
    u = (k + torch.rand(len(batch.x0), generator=gen)) / 2
    t = 0.02 + 0.96 * u
    t = 3 * t / (1 + 2 * t)
    at = t.view(-1, 1, 1, 1, 1)
    x_t = (1 - at) * batch.x0 + at * normal_like(batch.x0, gen)
    found = []

    def look(q, k, mask) -> None:
        weights = (torch.einsum("qhd,khd->hqk", q[0].double(), k[0].double()) / q.shape[-1] ** 0.5).exp()
        if mask is not None:
            weights = weights * mask[0, 0, 0]
        paid = weights / weights.sum(-1, keepdim=True)
        found.append(((paid[:, :4, 4:8].sum() + paid[:, 4:8, :4].sum()) / (8 * q.shape[2])).item())

    one = slice(clip % 2, clip % 2 + 1)
    net.watch = look
    with torch.no_grad():
        net(x_t[one], t[one], batch.cond.map(lambda x: x[one]))
    net.watch = None
    return found


@pytest.mark.parametrize("make", [small_wan, small_hunyuan], ids=["wan", "hunyuan"])
def test_attention_between_frames_by_explicit_sums(make):
    """3 clips in batches of 2 and 1, at 2 times, all tokens as queries; the block with the least is dropped first."""
    cfg, net = config(1, *WORDS, "score=attention_mass", "ratio=0.5", "queries=99"), make().requires_grad_(False)
    record, rows = rank(cfg, net, batches(2), [1.0] * net.num_blocks, None), []
    for clip in range(3):
        size = 2 if clip < 2 else 1
        batch = batches(2)(clip // 2).map(lambda x, size=size: x[:size])
        rows += [explicit(net, batch, clip, k) for k in range(2)]
    wanted = torch.tensor(rows).mean(0).tolist()
    assert [u["score"] for u in record["units"]] == pytest.approx(wanted, rel=1e-5)  # the network runs in float32
    order = sorted(range(net.num_blocks), key=wanted.__getitem__)
    count = len(record["pruned"])
    assert record["pruned"] == sorted(order[:count]) and record["ranking"] == order[::-1]
    assert (record["score_kind"], record["num_samples"], record["baseline_score"]) == ("attention_mass", 6, 0.0)
    declared = walks(network(net.config, (2, 4, 4), 16), [], cfg)
    assert (declared.clips, declared.count, [len(w.routes) for w in declared.walks]) == (1, 6, [1])


def test_attention_between_frames_needs_frames_and_whole_clips(tmp_path):
    cfg, net = config(1, *WORDS, "score=attention_mass"), small_wan().requires_grad_(False)
    still = lambda step: batches(2)(step).map(lambda x: x[:, :, :1] if x.dim() == 5 else x)  # noqa: E731
    with pytest.raises(ValueError, match="^score=attention_mass: the clips have 1 latent frame, and attention between"):
        rank(cfg, net, still, [1.0] * 4, None)
    folder = save_model(small_wan(), tmp_path / "m")
    shared = config(1, f"model={folder}", "score=attention_mass", "engine=deepspeed", "sequence_parallel=2")
    with pytest.raises(ValueError, match="^score=attention_mass: looks at all tokens of a clip; use sequence_parallel"):
        build(shared, None)


@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_the_ranking_drops_the_smallest(score):
    cfg, net = config(1, *WORDS, f"score={score}", "ratio=0.5"), small_wan().requires_grad_(False)
    with torch.no_grad():
        for p in net.blocks[0].parameters():
            p *= 0.5
    record = rank(cfg, net, batches(2), [1.0] * 4, None)
    found = (l2(net) if score == "l2" else taylor(net, list(evaluation_set(cfg, batches(2))))).tolist()
    order = sorted(range(4), key=found.__getitem__)
    assert record["pruned"] == sorted(order[:2]) and record["ranking"] == order[::-1]
    assert (record["score_kind"], record["num_samples"], record["baseline_score"]) == (score, 6, 0.0)
    assert [u["score"] for u in record["units"]] == pytest.approx(found)
    assert score != "l2" or 0 in record["pruned"]


def test_the_planner_counts_it():
    net = small_wan().requires_grad_(False)
    cost = network(net.config, (2, 4, 4), 16)
    for score, calls in (("l2", 0), ("taylor", 4)):
        cfg = config(1, *WORDS, f"score={score}")
        step = step_cost(cost, walks(cost, [], cfg), cfg)
        assert step.total("calls") == step.total("grad_calls") == calls
    samples = list(evaluation_set(config(1, *WORDS), batches(2)))
    net.block_calls = 0
    taylor(net, samples)
    assert net.block_calls == 4 * len(samples)


def test_searches_need_scores_of_sets():
    with pytest.raises(ConfigError, match="score=l2: scores single blocks, search=iterative needs scores of sets"):
        config(1, *WORDS, "score=l2", "search=iterative")
