"""Stages of one expert: draws inside its times, rollouts that pass through both, the planner's count, errors."""

import pytest
import torch
from helpers import KEPT, batches, config, small_wan

from fastlightgen import flow
from fastlightgen.config import load
from fastlightgen.models.experts import TwoExperts
from fastlightgen.models.folder.weights import save_model
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import distill
from fastlightgen.stages.build import Builder
from fastlightgen.stages.experts import rollout_walks, runs_of
from fastlightgen.stages.guided import renoised
from fastlightgen.stages.rollouts import Order, Rollouts
from fastlightgen.stages.scores import evaluation_set, held_out_error
from fastlightgen.stages.teacher import noised

BOUNDARY, SHIFT = 0.875, 5.0
RANGES = {"high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}
LADDER = flow.ladder(4, SHIFT)  # 1, .9375, .8333, .625
OWN = {"high": [0, 1], "low": [2, 3]}


def of(expert: str, stage: int, *words: str):
    return config(stage, f"expert={expert}", f"boundary={BOUNDARY}", f"shift={SHIFT}", *words)


@pytest.mark.parametrize("expert", RANGES)
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_have_the_distribution_of_all_times_given_the_range(expert: str, kind: str):
    """Against rejection: of unbounded draws those that lie inside. n draws of each differ by at most 1.95 sqrt(2 / n)
    in their distribution functions with probability 0.999 (Kolmogorov and Smirnov)."""
    low, high = RANGES[expert]
    drawn = flow.draw_times(20_000, SHIFT, kind, generator(1), (low, high)).double()
    free = flow.draw_times(200_000, SHIFT, kind, generator(2)).double()
    inside = free[(free >= low) & (free < high)][:20_000]
    assert low <= drawn.min() and drawn.max() <= high and len(inside) == 20_000
    grid = torch.cat([drawn, inside]).sort().values
    functions = [torch.searchsorted(x.sort().values, grid, right=True) / len(x) for x in (drawn, inside)]
    assert (functions[0] - functions[1]).abs().max() < 1.95 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize("expert", RANGES)
def test_every_draw_lies_inside(expert: str, monkeypatch):
    low, high = RANGES[expert]
    batch, prune = batches(4)(0), of(expert, 2)
    found = [noised(batch, prune, 1, step)[1] for step in range(50)]
    rank = of(expert, 1, "clips=4", "batch=2", "timesteps=3")
    found += [t for _, t, _, _ in evaluation_set(rank, batches(2))]
    score = of(expert, 3)
    found += [renoised(score, torch.zeros(4, 1, 1, 2, 2), generator(3, i))[0] for i in range(50)]
    net, seen = small_wan(), list[torch.Tensor]()
    net.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    held_out_error(net, batches(8)(0), prune)
    times = torch.cat([*found, *seen])
    assert low <= times.min() and times.max() <= high and seen
    assert times.min() < low + 0.1 and times.max() > high - 0.1  # and they fill the range


def students() -> dict:
    return {"high": small_wan(seed=1), "low": small_wan(seed=2)}


@pytest.mark.parametrize("rollouts", ["fresh", "shared"])
@pytest.mark.parametrize("expert", RANGES)
@torch.no_grad()
def test_rollouts_pass_through_both_experts(expert: str, rollouts: str):
    """The clips of the critic against the ladder walked by hand, with Euler steps."""
    nets = students()
    model = nets["high"] if expert == "high" else TwoExperts(nets["high"], nets["low"], BOUNDARY)
    cfg = of(expert, 3, "sampler=ode", f"rollouts={rollouts}", "ratio=2", "batch=2")
    own = flow.rungs_between(LADDER, cfg.bounds)
    assert list(own) == OWN[expert]
    rolled = Rollouts(cfg, Order(2, 1), model, LADDER, batches(2), own)
    seen = set()
    for c in range(8):
        gen = generator(7, c)
        clips = rolled.for_critic(c, gen)
        batch, x = clips.batch, normal_like(clips.batch.x0, generator(7, c))
        if rollouts == "shared":  # the walk draws its noise by the number of the student's next update
            x = rolled.walk(rolled.order.next_student(c)).inputs[0]
        for i in range(clips.rung + 1):
            v = nets["high" if i < 2 else "low"](x, LADDER[i], batch.cond)
            x0 = x - LADDER[i] * v
            x = x + (LADDER[min(i + 1, 3)] - LADDER[i]) * v
        torch.testing.assert_close(clips.x_hat, x0, rtol=0, atol=1e-6)
        seen.add(clips.rung)
    assert sorted(seen) == OWN[expert]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, list[str]]:
    """Stage II of each expert, and a student of the high-noise one."""
    root = tmp_path_factory.mktemp("experts")
    for name, net in students().items():
        made = {"stage": 2, "pruned_path": KEPT, "source": "a teacher", "expert": name, "boundary": BOUNDARY}
        save_model(net, root / name, **made)
    card = {"expert": "high", "boundary": BOUNDARY, "ladder": LADDER, "sampler": "stochastic", "shift": SHIFT}
    save_model(small_wan(seed=3).prune(KEPT), root / "partner", stage=3, **card)
    model = f"model={root / 'high'}"
    return {
        "high": [f"stage2_model={root / 'high'}", model],
        "low": [f"stage2_model={root / 'low'}", model, f"partner={root / 'partner'}"],
    }


class ToySource:
    name, description = "test", {}

    def batch(self, step: int, size: int, rows=None):
        return batches(size)(step)


def built(cfg):
    return distill.build(cfg, Builder(cfg, ToySource(), torch.device("cpu")))


@pytest.mark.parametrize("rollouts", ["fresh", "shared"])
@pytest.mark.parametrize("expert", RANGES)
@torch.no_grad()
def test_the_planner_counts_the_walks_of_both_networks(folders, expert: str, rollouts: str):
    """Over cycles of all rungs: predictions of the student without gradient, and of its partner."""
    cfg = of(expert, 3, *folders[expert], f"rollouts={rollouts}", "ratio=1", "count=generator", "iters=8")
    stage = built(cfg)
    assert (stage.nets.partner is None) == (expert == "high")
    assert (stage.nets.partner in stage.frozen) == (expert == "low")
    assert isinstance(stage.sampler()["model"], TwoExperts) == (expert == "low")
    nets = {"student": stage.nets.student} | ({"partner": stage.nets.partner} if expert == "low" else {})
    first = int(rollouts == "shared")  # the very first update of a student shares its walk with nobody
    if first:
        stage.critic_loss(0)
        for net in nets.values():
            net.block_calls = 0
    for step in range(first, first + 8):
        stage.student_loss(step)
        stage.critic_loss(step)
    counted = {name: net.block_calls / net.num_blocks / 8 for name, net in nets.items()}
    counted["student"] -= 1  # the student's last step in its own update, which carries gradient
    assert counted == pytest.approx({walk.net: walk.times for walk in rollout_walks(cfg)})
    card = {}
    stage.save("folder", lambda net, folder, **values: card.update(values))
    assert (card["expert"], card["boundary"], card["ladder"]) == (expert, BOUNDARY, LADDER)


def test_what_a_stage_of_one_expert_refuses(folders, tmp_path):
    low = folders["low"]
    cases = [
        (
            of("low", 3, *low[:2], f"run={tmp_path}/low"),
            "/high/stage3/model: there is no model folder; train",
        ),
        (of("low", 3, *low, "steps=3"), "has ladder [1.0, 0.9375, 0.8333333333333334, 0.625], this run [1.0, 0.9"),
        (
            of("low", 3, *low, "sampler=ode"),
            "has sampler stochastic, this run ode; both experts sample",
        ),
        (of("low", 3, *low[:1], f"partner={low[0][13:]}"), "has expert low, this run high; both experts"),
        (of("high", 3, *low), "expert=high: the network was trained with expert=low; give expert=low"),
        (of("low", 3, *low, "boundary=0.9"), "partner|boundary"),
        (
            of("low", 3, *low, "boundary=0.5", "rollout=data"),
            "boundary=0.5: the network was trained with boundary=0",
        ),
    ]
    for cfg, message in cases:
        with pytest.raises(ValueError) as error:
            built(cfg)
        assert any(part in str(error.value) for part in message.split("|")) and "\n" not in str(error.value)
    assert built(of("low", 3, *low[:2], "rollout=data")).nets.partner is None  # it starts from noised clips
    with pytest.raises(ValueError, match="no rung of the ladder 1, 0.9375, 0.8333, 0.625 lies between 0 and 0.5"):
        flow.rungs_between(LADDER, (0.0, 0.5))
    with pytest.raises(ValueError, match="no time from 0.02 to 0.3 lies between 0.875 and 1 after the shift of 5"):
        list(evaluation_set(of("high", 1, "t_range=[0.02,0.3]"), batches(2)))


def test_a_command_stands_for_the_runs_of_its_experts(tmp_path):
    def runs(*words: str):
        return runs_of(load(["stage=2", "run=R", *words]))

    both = [(one.expert, one.run, one.boundary, one.bounds) for one in runs("model=tiny-a14b")]
    assert both == [("high", "R/high", 0.875, (0.875, 1.0)), ("low", "R/low", 0.875, (0.0, 0.875))]
    assert [one.expert for one in runs("model=tiny-a14b", "expert=low", "boundary=0.5")] == ["low"]
    (plain,) = runs("model=tiny")
    assert (plain.expert, plain.run, plain.bounds) == ("auto", "R", (0.0, 1.0))
    for word in ("expert=high", "boundary=0.5", "partner=x"):
        with pytest.raises(ValueError, match=f"{word}: model=tiny has one network, and only models with two"):
            runs("model=tiny", word)
    save_model(small_wan(), tmp_path / "m", expert="low", boundary=0.9, stage=0)
    (one,) = runs(f"model={tmp_path / 'm'}")
    assert (one.expert, one.run, one.boundary) == ("low", "R", 0.9)
    with pytest.raises(ValueError, match="expert=high: model=.*m is the low-noise expert; leave expert= out"):
        runs(f"model={tmp_path / 'm'}", "expert=high")
