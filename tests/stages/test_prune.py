"""Stage II against Eq. 7 written out with separate forwards in float64; the guard against its divergence."""

import copy
import json

import pytest
import torch
from helpers import BLOCKS, KEPT, PRUNED, batches, config, run_train, small_wan, write_inputs

from fastlightgen import flow
from fastlightgen.blocks import draw_keep
from fastlightgen.engine.local import LocalEngine
from fastlightgen.parallel import ranks
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import prune
from fastlightgen.stages.prune import Prune
from fastlightgen.stages.scores import held_out_error
from fastlightgen.stages.teacher import noised

DOUBLE = batches(2, torch.float64)


def make(*words: str, moved: float = 0.05) -> Prune:
    """Return a stage in float64 whose network differs from its frozen target."""
    net = small_wan().double()
    stage = Prune(config(2, "text_dropout=0.5", *words), net, PRUNED, DOUBLE, lambda: DOUBLE(99), {})
    stage.begin()
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += moved * torch.randn(p.shape, generator=gen, dtype=p.dtype)
    return stage


def gradients(loss, net) -> dict[str, torch.Tensor]:
    """Return the gradients by name; zeros for parameters without one."""
    params = dict(net.named_parameters())
    live = {k: p for k, p in params.items() if p.requires_grad}
    out = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
    found = {k: g for k, g in zip(live, out, strict=True) if g is not None}
    return {k: found.get(k, torch.zeros_like(p)) for k, p in params.items()}


def by_hand(stage: Prune, step: int, keep=KEPT):
    """Return the (pruned, unpruned) part of Eq. 7 plus the kappa term, each from its own forward."""
    cfg, net, batch = stage.cfg, stage.net, DOUBLE(step)
    x_t, t, noise, cond = noised(batch, cfg, cfg.seed, 2, step)
    v_star = noise - batch.x0
    v_p, v_u = net(x_t, t, cond, keep), net(x_t, t, cond)
    target = (v_u if cfg.target == "self" else stage.target(x_t, t, cond)).detach()

    def distance(a, b):
        return ((a - b) ** 2).sum() / a.numel()

    pruned = (1 - cfg.alpha) * distance(v_p, v_star) + cfg.alpha * distance(v_p, target)
    kappa = 0.0 if cfg.target == "self" else cfg.kappa_unpruned
    return pruned, (1 - cfg.alpha) * distance(v_u, v_star) + cfg.alpha * kappa * distance(v_u, target)


@pytest.mark.parametrize("target", ["self", "frozen", "ema"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kappa", [0.0, 0.7])
def test_loss_and_gradients_are_those_of_eq_7(target, alpha, kappa):
    stage = make(f"target={target}", f"alpha={alpha}", f"kappa_unpruned={kappa}", "target_decay=0.9")
    stage.check(1)  # moves the averaged target
    loss, record = stage.updates(3)[0].loss()
    wanted = sum(by_hand(stage, 3))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10) and loss.item() > 0
    got, hand = gradients(loss, stage.net), gradients(wanted, stage.net)
    assert all(torch.allclose(got[k], hand[k], rtol=1e-8, atol=1e-14) for k in hand)
    if alpha == 1:
        assert record["distill_pruned"] == pytest.approx(by_hand(stage, 3)[0].item(), rel=1e-10)


def test_both_paths_follow_the_guided_target():
    """guided=W: the target is null + W (cond - null) of the frozen network, from two separate forwards."""
    stage = make("guided=2.5")
    stage.target.block_calls = 0
    loss, _ = stage.updates(2)[0].loss()
    assert stage.target.block_calls == 2 * BLOCKS
    cfg, batch = stage.cfg, DOUBLE(2)
    x_t, t, _, cond = noised(batch, cfg, cfg.seed, 2, 2)
    with torch.no_grad():
        v_cond, v_null = stage.target(x_t, t, cond), stage.target(x_t, t, batch.null)
    dropped = (v_cond - v_null).flatten(1).abs().amax(1) == 0
    assert dropped.any() and not dropped.all()  # guidance changes nothing where the prompt was dropped
    target = 2.5 * v_cond - 1.5 * v_null
    wanted = sum(((v - target) ** 2).mean() for v in (stage.net(x_t, t, cond, KEPT), stage.net(x_t, t, cond)))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    got, hand = gradients(loss, stage.net), gradients(wanted, stage.net)
    assert all(torch.allclose(got[k], hand[k], rtol=1e-8, atol=1e-14) for k in hand)


def test_a_guided_target_must_not_be_the_network_itself():
    with pytest.raises(ValueError, match="guided=2.0: target=self would guide its own guided prediction again"):
        config(2, "guided=2", "target=self")


def test_the_two_paths_take_one_walk():
    """The paths share the p blocks before the first skipped one: N + K - p block calls."""
    stage = make("alpha=0.5")
    stage.net.block_calls = 0
    stage.loss(0)
    assert stage.net.block_calls == BLOCKS + len(KEPT) - min(PRUNED)


def test_ema_target_follows_by_its_decay():
    stage = make("target=ema", "target_decay=0.75", "guard_every=1000")
    before = {k: v.clone() for k, v in stage.target.named_parameters()}
    stage.check(1)
    for k, p in stage.net.named_parameters():
        assert torch.allclose(stage.target.get_parameter(k), 0.75 * before[k] + 0.25 * p, rtol=1e-12)


def test_the_frozen_target_does_not_move():
    stage = make("alpha=0.5", moved=0.0)
    teacher = copy.deepcopy(stage.net.state_dict())
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    for step in range(3):
        engine.apply(stage.updates(step)[0], step)
        stage.check(step + 1)
    assert all(torch.equal(v, teacher[k]) for k, v in stage.target.state_dict().items())
    assert not all(torch.equal(v, teacher[k]) for k, v in stage.net.state_dict().items())


@pytest.mark.parametrize("words", [("target=self",), ("target=frozen", "kappa_unpruned=0")])
def test_skipped_blocks_stay_when_nothing_trains_them(words):
    """With drop=joint and alpha=1, Eq. 6 does not train the pruned blocks, so weight decay must not change them."""
    stage = make(*words, "alpha=1", "weight_decay=0.5", "lr=0.01", "warmup=0", "guard_every=1000")
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    before = copy.deepcopy(stage.net.state_dict())
    # A sharded optimizer decays all its parameters, so it must not get those of the pruned blocks.
    held = {id(p) for p in engine.optimizers["student"].param_groups[0]["params"]}
    assert all((id(p) in held) == (i not in PRUNED) for i in range(BLOCKS) for p in stage.net.blocks[i].parameters())
    for step in range(3):
        loss, _ = stage.loss(step)
        loss.backward()
        assert all(p.grad is None for i in PRUNED for p in stage.net.blocks[i].parameters())
        stage.net.zero_grad()
        engine.apply(stage.updates(step)[0], step)
    for key, value in stage.net.state_dict().items():
        inside = any(key.startswith(f"blocks.{i}.") for i in PRUNED)
        assert torch.equal(value, before[key]) == inside, key


@pytest.mark.parametrize(
    "words", [("alpha=0.5", "target=frozen"), ("alpha=1", "target=frozen"), ("alpha=1", "target=self")]
)
def test_the_sampled_estimator_is_unbiased(monkeypatch, words):
    """p E[skip] + (1 - p) E[no skip] is the full gradient for one x_t; the coin says skip with probability p."""
    p = 0.3
    sampled, full = make("estimator=sampled", f"p={p}", *words), make("estimator=full", *words)
    fixed = noised(DOUBLE(0), sampled.cfg, 0, 2, 0)
    monkeypatch.setattr(prune, "noised", lambda *a: fixed)
    for stage in (sampled, full):
        stage.batches = lambda step: DOUBLE(0)
    coins = [torch.rand((), generator=generator(0, 3, step)).item() < p for step in range(4000)]
    assert abs(sum(coins) / 4000 - p) < 3 * (p * (1 - p) / 4000) ** 0.5
    skip, whole = coins.index(True), coins.index(False)
    idle = {key: torch.zeros_like(v) for key, v in sampled.net.named_parameters()}  # no update: no gradient
    one, other = (
        gradients(sampled.loss(step)[0], sampled.net) if sampled.updates(step) else idle for step in (skip, whole)
    )
    assert (other is idle) == ("target=self" in words)
    wanted = gradients(full.loss(0)[0], full.net)
    assert any(g.abs().max() > 0 for g in wanted.values())
    for key, g in wanted.items():
        assert torch.allclose(p * one[key] + (1 - p) * other[key], g, rtol=1e-8, atol=1e-14), key


def test_independent_masks():
    """Masks depend on seed and step only. P(all dropped) = f + (1 - f) p^3, P(one dropped) = f + (1 - f) p."""
    pruned, p, f, n = [1, 2, 4], 0.4, 0.25, 4000
    draws = [draw_keep(pruned, 6, p, f, generator(7, 3, step)) for step in range(n)]
    assert draws == [draw_keep(pruned, 6, p, f, generator(7, 3, step)) for step in range(n)]
    assert all({0, 3, 5} <= set(d) for d in draws)

    def near(frequency, wanted):  # within three standard deviations
        assert abs(frequency - wanted) < 3 * (wanted * (1 - wanted) / n) ** 0.5

    near(sum(d == [0, 3, 5] for d in draws) / n, f + (1 - f) * p**3)
    for block in pruned:
        near(sum(block not in d for d in draws) / n, f + (1 - f) * p)
    near(sum(1 not in d and 4 in d for d in draws) / n, (1 - f) * p * (1 - p))


def test_independent_drop_trains_the_drawn_subnetwork():
    stage = make("drop=independent", "p=0.5", "full_drop_prob=0.2", "alpha=0.5", "seed=3")
    seen = set()
    for step in range(6):
        keep = draw_keep(PRUNED, BLOCKS, 0.5, 0.2, generator(3, 3, step))
        seen.add(tuple(keep))
        assert stage.loss(step)[0].item() == pytest.approx(sum(by_hand(stage, step, keep)).item(), rel=1e-10)
    assert len(seen) > 1


def test_text_dropout_reaches_the_loss():
    stage = make("text_dropout=1.0", "alpha=0.0")
    batch = DOUBLE(2)
    gen = generator(0, 2, 2)
    t = flow.draw_times(2, 3.0, "uniform", gen)
    torch.rand(2, generator=gen)
    noise = normal_like(batch.x0, gen)
    x_t = flow.add_noise(batch.x0, noise, t)
    terms = [stage.net(x_t, t, batch.null, keep) - (noise - batch.x0) for keep in (KEPT, None)]
    assert stage.loss(2)[0].item() == pytest.approx(sum((d**2).mean().item() for d in terms), rel=1e-10)


def test_error_is_eq_4_on_the_held_out_clips():
    stage, batch = make(), DOUBLE(99)
    noise = normal_like(batch.x0, generator(0, 4))
    t = torch.tensor([3 * u / (1 + 2 * u) for u in (0.02, 0.98)])
    x_t = flow.add_noise(batch.x0, noise, t)
    for keep in (None, KEPT):
        v = stage.net(x_t, t, batch.cond, keep)
        wanted = [((x_t[b] - t[b] * v[b] - batch.x0[b]) ** 2).mean().item() for b in range(2)]
        assert held_out_error(stage.net, stage.held_out(), stage.cfg, keep) == pytest.approx(sum(wanted) / 2, rel=1e-5)


@pytest.mark.parametrize("together", [1, 2])
def test_ranks_share_the_held_out_clips(monkeypatch, together):
    """Five clips on three (groups of) ranks: all walk equally often, and their tables add up to one process's error."""
    stage, tables, walks = make("micro_batch=1"), [], []
    stage.held_out = lambda: batches(5, torch.float64)(99)
    alone = held_out_error(stage.net, stage.held_out(), stage.cfg)
    real = stage.net._walk
    monkeypatch.setattr(stage.net, "_walk", lambda *a: walks.append(len(a[0])) or real(*a))
    monkeypatch.setattr(ranks, "summed", lambda table: tables.append(table) or table)
    stage.cfg.sequence_parallel = together
    monkeypatch.setattr(ranks, "size", lambda: 3 * together)
    for rank in range(3 * together):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        held_out_error(stage.net, stage.held_out(), stage.cfg)
    assert walks == [1, 1] * 3 * together
    assert sum(tables).mean().item() == pytest.approx(alone, rel=1e-6)


def test_the_guard_stops_the_literal_reading(tmp_path, capsys):
    """With alpha=1 and target=self the run diverges; the same run with target=frozen does not."""
    words = [*write_inputs(tmp_path)[2], "lr=0.03", "warmup=0", "iters=12", "guard_every=2", "save_every=2"]
    with pytest.raises(SystemExit) as stop:
        run_train("stage=2", f"run={tmp_path}/self", *words, "target=self")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "target=frozen" in err
    assert "the x0 error of the full path" in err and "guard=1.5" in err
    run_train("stage=2", f"run={tmp_path}/frozen", *words, "target=frozen")
    card = json.loads((tmp_path / "frozen/stage2/model/fastlightgen.json").read_text())
    assert card["pruned_path"] == KEPT and card["stage"] == 2 and card["shift"] == 3.0


def test_the_guard_also_stops_a_network_that_is_not_finite():
    stage = make("guard_every=1")
    with torch.no_grad():
        next(stage.net.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="step 1: the x0 error of the full path is nan"):
        stage.check(1)
