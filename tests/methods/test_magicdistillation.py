"""method=magicdistillation against its formulas in float64, with the adapters merged into plain networks; its walks."""

import copy

import pytest
import torch
from helpers import BLOCKS, batches, small_wan
from method_cases import (
    OWN,
    STAGE2,
    TEACHER,
    built,
    clips,
    compare_with_plan,
    judged,
    moved,
    noised,
    times,
    with_gradient,
    without_gradient,
    write_models,
)

from fastlightgen.methods.magicdistillation import ground_truth_loss
from fastlightgen.models.lora import LoraLinear
from fastlightgen.rng import generator, normal_like

DOUBLE = batches(2, torch.float64)
PLAIN = ["ratio=2", "critic_start=0", "rollouts=fresh", "sampler=stochastic", "lora_rank=3"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return ["method=magicdistillation", *PLAIN, *write_models(tmp_path_factory.mktemp("models"))]


def make(*words: str, dtype: torch.dtype = torch.float64):
    stage = built(*words, dtype=dtype)
    moved(stage.student, seed=1)
    moved(stage.nets.fake_trained, seed=2)
    return stage


def merged(stage, strength: float):
    """The frozen network with the adapters multiplied into its weights at a strength."""
    net = copy.deepcopy(stage.teacher)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                child.base.weight.data += strength * child.up.data @ child.down.data
                setattr(module, name, child.base)
    return net


def test_the_ground_truth_loss_by_hand():
    x0_hat, x0 = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    assert ground_truth_loss(x0_hat, x0).item() == (1 + 4) / 2


VARIANTS = [
    [],
    ["alpha_weak=0", "gan=0", "guidance=4"],
    ["alpha_weak=0.5", "alpha_strong=1.5", "gan=0.2", "gt=0"],
    ["student=full", "guidance=1", "gan=0.1", "gt=0.7", "checkpointing=true", "rollout=data"],
    ["gt=0.7", "rollouts=shared"],
]


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_the_student_s_gradient(words, more):
    stage = make(*words, *more)
    given = dict(m.split("=") for m in more)
    w, gan, gt = (float(given.get(k, v)) for k, v in (("guidance", OWN), ("gan", 5e-3), ("gt", 0.25)))
    critic = merged(stage, float(given.get("alpha_strong", 1)))
    real = merged(stage, float(given.get("alpha_weak", 0.25)))
    params = list(stage.student.parameters())
    for g in (0, 3):
        shared = "rollouts=shared" in more
        batch = DOUBLE(g if shared else 2 * g)
        x_hat, gen = clips(stage, 5, g, batch, generator(0, 13, g) if shared else None)
        t, x = times(gen), x_hat.detach()
        noise = normal_like(x, gen)
        parts = []
        for b in range(2):
            cond, null = (c.map(lambda v, b=b: v[b : b + 1]) for c in (batch.cond, batch.null))
            x_t, at = noised(x[b : b + 1], t[b : b + 1], noise[b : b + 1]), t[b : b + 1]
            v_c, v_n = real(x_t, at, cond), real(x_t, at, null)
            v_real = v_n + w * (v_c - v_n)
            gap = (x[b] - (x_t - t[b] * v_real)[0]).abs().mean() + 1e-6
            parts.append((t[b] * (v_real - critic(x_t, at, cond)) / gap)[0].detach())
        d = torch.stack(parts)
        wanted, outer = 0.5 * d.square().mean(), d / d.numel()
        if gan:
            adversarial = -torch.log(torch.sigmoid(judged(critic, noised(x_hat, t, noise), t, batch.cond)[1])).mean()
            wanted = wanted + gan * adversarial.detach()
            outer = outer + gan * torch.autograd.grad(adversarial, x_hat, retain_graph=True)[0]
        order = torch.randperm(4, generator=generator(0, 12, 5, g // 4)).tolist()
        u = 1 - order[g % 4] / 4
        tau = 3 * u / (1 + 2 * u)
        x_tau = (1 - tau) * batch.x0 + tau * normal_like(batch.x0, generator(0, 18, g))
        truth = (x_tau - tau * stage.student(x_tau, tau, batch.cond) - batch.x0).square().mean()
        hand = torch.autograd.grad(x_hat, params, outer, retain_graph=True)
        hand = [a + gt * b for a, b in zip(hand, torch.autograd.grad(truth, params), strict=True)]
        loss, record = stage.student_loss(g)
        assert loss.item() == pytest.approx((wanted + gt * truth).item(), rel=1e-6)
        assert ("gt" in record) == (gt > 0) and (not gt or record["gt"] == pytest.approx(truth.item(), rel=1e-6))
        loss.backward()
        assert without_gradient(stage.teacher)
        for p, h in zip(params, hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.student.zero_grad()


@pytest.mark.parametrize("more", [[], ["gan=0"], ["alpha_strong=0.8", "gan_critic=0.5"]], ids=" ".join)
def test_the_critic_trains_adapters_and_heads_alone(words, more):
    stage = make(*words, *more)
    given = dict(m.split("=") for m in more)
    gan, weight = float(given.get("gan", 5e-3)), float(given.get("gan_critic", 1e-2))
    critic = merged(stage, float(given.get("alpha_strong", 1)))
    for c in (0, 3):
        batch = DOUBLE(c)
        x_hat, gen = clips(stage, 6, c, batch)
        t, x = times(gen), x_hat.detach()
        noise = normal_like(x, gen)
        v = critic(noised(x, t, noise), t, batch.cond)
        wanted = (v - (noise - x)).square().mean()
        if gan:
            _, fake = judged(critic, noised(x, t, noise), t, batch.cond)
            _, real = judged(critic, noised(batch.x0, t, noise), t, batch.cond)
            judging = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
            wanted = wanted + weight * judging
        loss, _ = stage.critic_loss(c)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        loss.backward()
        trained = {id(p) for p in stage.nets.fake_trained.parameters()}
        assert with_gradient(stage.nets.fake_trained) and without_gradient(stage.student)
        assert all((p.grad is not None) == (id(p) in trained) == p.requires_grad for p in stage.teacher.parameters())
        stage.nets.fake_trained.zero_grad()
    assert ("discriminator" in stage.nets.fake_trained) == (gan > 0)


def test_what_the_networks_start_from(words):
    """New adapters change nothing: critic and real network are the teacher, at every strength."""
    x_t, t, cond, null = small_wan().example_inputs(2)
    teacher = small_wan(seed=TEACHER)
    stage = built(*words, dtype=torch.float32)
    with torch.no_grad():
        v_c, v_n = stage.nets.guidance(x_t, t, type("Batch", (), {"cond": cond, "null": null}))
        assert torch.equal(stage.nets.fake(x_t, t, cond), teacher(x_t, t, cond))
        torch.testing.assert_close(v_c, teacher(x_t, t, cond), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v_n, teacher(x_t, t, null), rtol=1e-5, atol=1e-6)
        assert torch.equal(stage.student(x_t, t, cond), small_wan(seed=STAGE2)(x_t, t, cond, [0, 3]))
    assert stage.roles["fake"].lr == 5e-5 and stage.roles["fake"].host is stage.teacher and stage.frozen == []


@pytest.mark.parametrize(
    "more",
    [[], ["gan=0", "alpha_weak=0"], ["student=full", "gt=0", "guidance=1"], ["checkpointing=true"]],
    ids=" ".join,
)
def test_the_planner_counts_a_real_iteration(words, more):
    """Low-rank adapters are planned a little off (see test_stage_cost.py), so that operations are not compared to 0."""
    stage = built(*words, *more, "steps=1", "count=generator", dtype=torch.float32)
    cost = compare_with_plan(stage, tolerance=0.03)
    kept, n = stage.student.num_blocks, BLOCKS
    student = 3 * kept if "gt=0" in more else 4 * kept
    teacher = (1 if "guidance=1" in more else 2) * n
    assert cost.total("calls") == student + teacher + (3 * n if "gan=0" in more else 5 * n)
    assert sum(cost.frozen.values()) == sum(p.numel() for p in stage.teacher.parameters() if not p.requires_grad)
