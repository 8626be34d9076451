"""method=regression against its formula in float64, sample by sample; its walks against a real step."""

import pytest
import torch
from helpers import BLOCKS, KEPT, batches, small_wan
from method_cases import (
    OWN,
    STAGE2,
    TEACHER,
    built,
    compare_with_plan,
    with_gradient,
    without_gradient,
    write_models,
)

from fastlightgen.methods.regression import regression_loss
from fastlightgen.rng import generator, normal_like

DOUBLE = batches(2, torch.float64)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return ["method=regression", *write_models(tmp_path_factory.mktemp("models"))]


def test_the_loss_by_hand():
    v = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = regression_loss(v, target)
    assert loss.item() == (1 + 0 + 4 + 4) / 4
    loss.backward()
    assert target.grad is None and torch.equal(v.grad, 2 * (v - target).detach() / 4)


@pytest.mark.parametrize("more", [[], ["guidance=3.5"], ["guidance=1"], ["student=full", "guidance=3.5"]], ids=" ".join)
def test_the_student_follows_the_guided_teacher(words, more):
    stage = built(*words, *more, "time=logit_normal")
    w = float(dict(m.split("=") for m in more).get("guidance", OWN))
    teacher = small_wan(seed=TEACHER).double()
    student = (
        small_wan(seed=TEACHER).double() if "student=full" in more else small_wan(seed=STAGE2).double().prune(KEPT)
    )
    for step in (0, 3):
        batch, gen = DOUBLE(step), generator(0, 15, step)
        torch.rand(2, generator=gen)  # the uniform draw, which logit-normal times replace
        u = torch.sigmoid(torch.randn(2, generator=gen)).clamp(1e-4, 1)
        t = 3 * u / (1 + 2 * u)
        noise = normal_like(batch.x0, gen)
        parts = []
        for b in range(2):
            cond, null = (c.map(lambda v, b=b: v[b : b + 1]) for c in (batch.cond, batch.null))
            x_t = (1 - t[b].double()) * batch.x0[b : b + 1] + t[b].double() * noise[b : b + 1]
            v_c, v_n = teacher(x_t, t[b : b + 1], cond), teacher(x_t, t[b : b + 1], null)
            target = v_n + w * (v_c - v_n) if w != 1 else v_c
            parts.append((student(x_t, t[b : b + 1], cond) - target.detach()).square().mean())
        wanted = sum(parts) / 2
        loss, record = stage.loss(step)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and record == {}
        hand = torch.autograd.grad(wanted, list(student.parameters()))
        loss.backward()
        assert with_gradient(stage.student) and without_gradient(stage.teacher)
        for p, h in zip(stage.student.parameters(), hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.student.zero_grad()


@pytest.mark.parametrize(
    "more", [[], ["guidance=1"], ["student=full"], ["checkpointing=true", "keep_attention=1"]], ids=" ".join
)
def test_the_planner_counts_a_real_step(words, more):
    stage = built(*words, *more, dtype=torch.float32)
    cost = compare_with_plan(stage)
    kept, predictions = stage.student.num_blocks, 1 if "guidance=1" in more else 2
    assert cost.total("grad_calls") == kept and cost.total("calls") == kept + predictions * BLOCKS
    assert cost.frozen["teacher"] == sum(p.numel() for p in stage.teacher.parameters())
