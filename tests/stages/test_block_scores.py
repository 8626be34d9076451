"""Scores of single blocks: magnitude by hand, Taylor against finite differences; the ranking that they make."""

import copy

import pytest
import torch
from helpers import batches, config, small_wan

from fastlightgen.config import ConfigError
from fastlightgen.models.families import network
from fastlightgen.planner.step import step_cost
from fastlightgen.stages.rank import rank, walks
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
