"""method=lcm against its formulas in float64, sample by sample; its averaged target; its walks against a real step."""

import copy

import pytest
import torch
from helpers import BLOCKS, batches, small_wan
from method_cases import (
    CPU,
    OWN,
    TEACHER,
    built,
    compare_with_plan,
    moved,
    with_gradient,
    without_gradient,
    write_models,
)

from fastlightgen.engine.local import LocalEngine
from fastlightgen.methods.lcm import euler, grid, pseudo_huber
from fastlightgen.rng import generator, normal_like

DOUBLE = batches(2, torch.float64)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return ["method=lcm", "warmup=0", *write_models(tmp_path_factory.mktemp("models"))]


def test_the_distance_by_hand():
    """Elementwise: 2 is linear, 0.001 quadratic. The mean over elements; no element outweighs the others."""
    a = torch.tensor([2.0, 0.001, 0.0], dtype=torch.float64, requires_grad=True)
    loss = pseudo_huber(a, torch.zeros(3, dtype=torch.float64), 1e-3)
    wanted = ((4 + 1e-6) ** 0.5 - 1e-3 + (2e-6) ** 0.5 - 1e-3) / 3
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    loss.backward()
    assert a.grad.tolist() == pytest.approx([2 / (4 + 1e-6) ** 0.5 / 3, 1e-3 / 2e-6**0.5 / 3, 0], rel=1e-9)


def test_the_grid_is_the_teacher_s_schedule():
    """K equal steps under the time shift; the teacher's K Euler steps pass these times."""
    times = grid(50, 5.0)
    wanted = [5 * (k / 50) / (1 + 4 * (k / 50)) for k in range(51)]
    assert times.tolist() == pytest.approx(wanted, abs=1e-7) and (times[0], times[-1]) == (0, 1)


def test_an_euler_step_of_a_straight_path_ends_on_it():
    x0, noise = torch.randn(2, 2, 3, 1, 1, 1, dtype=torch.float64).unbind(0)
    t, r = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.7, 0.0]).double()
    at, to = t.view(-1, 1, 1, 1, 1), r.view(-1, 1, 1, 1, 1)
    made = euler((1 - at) * x0 + at * noise, noise - x0, t, r)
    torch.testing.assert_close(made, (1 - to) * x0 + to * noise, rtol=1e-12, atol=1e-12)


VARIANTS = [[], ["guidance=3.5", "points=2"], ["target=ema", "distance=l2"], ["student=full", "points=48", "c=0.1"]]


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_the_loss(words, more):
    stage = built(*words, *more)
    moved(stage.student)
    given = dict(m.split("=") for m in more)
    w, points, c = float(given.get("guidance", OWN)), int(given.get("points", 50)), float(given.get("c", 1e-3))
    teacher, student = small_wan(seed=TEACHER).double(), copy.deepcopy(stage.student)
    target = copy.deepcopy(stage.target if "target=ema" in more else stage.student)
    seen = set()
    for step in range(4):
        batch, gen = DOUBLE(step), generator(0, 17, step)
        n = 1 + (torch.rand(2, generator=gen) * points).long()
        seen |= set(n.tolist())
        noise = normal_like(batch.x0, gen)
        parts = []
        for b in range(2):
            cond, null = (v.map(lambda x, b=b: x[b : b + 1]) for v in (batch.cond, batch.null))
            u = (n[b] - torch.tensor([0.0, 1.0])) / points  # in float32, as the stage's times
            t, r = (3 * u / (1 + 2 * u)).tolist()
            x_t = (1 - t) * batch.x0[b : b + 1] + t * noise[b : b + 1]
            v_c, v_n = teacher(x_t, t, cond), teacher(x_t, t, null)
            x_r = (x_t + (r - t) * (v_n + w * (v_c - v_n))).detach()
            wanted = x_r if r == 0 else (x_r - r * target(x_r, r, cond)).detach()
            d = x_t - t * student(x_t, t, cond) - wanted
            parts.append(d.square().mean() if "distance=l2" in more else ((d**2 + c**2).sqrt() - c).mean())
        by_hand = sum(parts) / 2
        loss, record = stage.loss(step)
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6) and record == {}
        hand = torch.autograd.grad(by_hand, list(student.parameters()))
        loss.backward()
        assert with_gradient(stage.student) and without_gradient(stage.teacher)
        assert stage.target is None or without_gradient(stage.target)
        for p, h in zip(stage.student.parameters(), hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.student.zero_grad()
    assert points > 2 or seen == {1, 2}  # the last step of the teacher ends at r = 0


def test_every_point_of_the_grid_is_drawn(words, monkeypatch):
    stage = built(*words, "points=3", "batch=8", dtype=torch.float32)
    seen = []
    monkeypatch.setattr("fastlightgen.methods.lcm.euler", lambda x, v, t, r: seen.append((t, r)) or x)
    for step in range(25):
        stage.loss(step)
    t, r = (torch.cat(column) for column in zip(*seen, strict=True))
    places = [(t == time).sum().item() for time in grid(3, 3.0)]
    assert places[0] == 0 and sum(places) == 200
    assert all(abs(count - 200 / 3) < 3 * (200 * 2 / 9) ** 0.5 for count in places[1:])  # three standard deviations
    assert all((grid(3, 3.0) == b).nonzero() + 1 == (grid(3, 3.0) == a).nonzero() for a, b in zip(t, r, strict=True))


def test_the_target_follows_the_student(words):
    stage = built(*words, "target=ema", "target_decay=0.8", "lr=0.01", dtype=torch.float32)
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    before = [p.clone() for p in stage.target.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, stage.student.parameters(), strict=True))
    engine.apply(stage.updates(0)[0], 0)
    stage.check(1)
    for old, now, p in zip(before, stage.target.parameters(), stage.student.parameters(), strict=True):
        torch.testing.assert_close(now, 0.8 * old + 0.2 * p, rtol=1e-6, atol=1e-7)
        assert not torch.equal(now, old) and not now.requires_grad


@pytest.mark.parametrize(
    "more", [[], ["target=ema", "guidance=1"], ["student=full", "checkpointing=true"]], ids=" ".join
)
def test_the_planner_counts_a_real_step(words, more):
    stage = built(*words, *more, dtype=torch.float32)
    cost = compare_with_plan(stage)
    teacher = (1 if "guidance=1" in more else 2) * BLOCKS
    assert cost.total("calls") == 2 * stage.student.num_blocks + teacher
    assert ("target" in cost.frozen) == (stage.target is not None)
