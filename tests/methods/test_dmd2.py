"""method=dmd2 against its formulas in float64, with and without a discriminator; its walks against real steps."""

import copy
import math

import pytest
import torch
from helpers import BLOCKS, KEPT, batches, small_wan
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

from fastlightgen.models.constant import constant
from fastlightgen.rng import normal_like
from fastlightgen.stages.adversarial import pushed
from fastlightgen.stages.discriminator import discriminator_loss, generator_loss, read_blocks

DOUBLE = batches(2, torch.float64)
PLAIN = ["ratio=2", "critic_start=0", "rollouts=fresh", "sampler=stochastic"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return ["method=dmd2", *PLAIN, *write_models(tmp_path_factory.mktemp("models"))]


def make(*words: str, dtype: torch.dtype = torch.float64):
    """A stage whose student and critic differ from the networks that they start from."""
    stage = built(*words, dtype=dtype)
    moved(stage.student, seed=1)
    moved(stage.nets.fake_trained, seed=2)
    return stage


def test_the_adversarial_losses_by_hand():
    real, fake = torch.tensor([[0.5, -2.0]]).double(), torch.tensor([[1.0, 3.0]]).double()
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    wanted = -(math.log(sigmoid(0.5)) + math.log(sigmoid(-2))) / 2
    wanted -= (math.log(1 - sigmoid(1)) + math.log(1 - sigmoid(3))) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(wanted, rel=1e-12)
    wanted = -(math.log(sigmoid(1)) + math.log(sigmoid(3))) / 2
    assert generator_loss(fake).item() == pytest.approx(wanted, rel=1e-12)
    assert generator_loss(torch.tensor([-800.0])).item() == 800  # where the logarithm of a rounded sigmoid is infinite


def test_a_pushed_loss_has_the_given_value_and_gradient():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, dtype=torch.float64)
    loss = pushed(x, torch.tensor(0.7, dtype=torch.float64), g)
    loss.backward()
    assert loss.item() == 0.7 and torch.equal(x.grad, g)


def test_which_blocks_are_read():
    assert read_blocks(40, 3) == [19, 29, 39] and read_blocks(30, 3) == [14, 22, 29]
    assert read_blocks(28, 1) == [27] and read_blocks(4, 3) == [1, 2, 3] and read_blocks(2, 5) == [1]


VARIANTS = [
    [],
    ["gan=0", "guidance=4"],
    ["guidance=1", "gan=0.3"],
    ["student=full", "guidance=3.5", "gan=0.1", "checkpointing=true"],
    ["fake_arch=pruned", "gan=0.1"],
]


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_the_student_s_gradient(words, more):
    """Eq. 8 with a plainly guided teacher, and the gradient of -log D through the critic, in one graph."""
    stage = make(*words, *more)
    given = dict(m.split("=") for m in more)
    w, gan = float(given.get("guidance", OWN)), float(given.get("gan", 5e-3))
    teacher, critic = small_wan(seed=TEACHER).double(), copy.deepcopy(stage.nets.fake_net)
    params = list(stage.student.parameters())
    for g in (0, 3):
        batch = DOUBLE(2 * g)
        x_hat, gen = clips(stage, 5, g, batch)
        t, x = times(gen), x_hat.detach()
        noise = normal_like(x, gen)
        parts = []
        for b in range(2):
            cond, null = (c.map(lambda v, b=b: v[b : b + 1]) for c in (batch.cond, batch.null))
            x_t, at = noised(x[b : b + 1], t[b : b + 1], noise[b : b + 1]), t[b : b + 1]
            v_c, v_n = teacher(x_t, at, cond), teacher(x_t, at, null)
            v_real = v_n + w * (v_c - v_n)
            gap = (x[b] - (x_t - t[b] * v_real)[0]).abs().mean() + 1e-6
            parts.append((t[b] * (v_real - critic(x_t, at, cond)) / gap)[0].detach())
        d = torch.stack(parts)
        wanted = 0.5 * d.square().mean()
        outer = d / d.numel()
        if gan:
            _, logits = judged(critic, noised(x_hat, t, noise), t, batch.cond)
            adversarial = -torch.log(torch.sigmoid(logits)).mean()
            wanted = wanted + gan * adversarial.detach()
            outer = outer + gan * torch.autograd.grad(adversarial, x_hat, retain_graph=True)[0]
        loss, record = stage.student_loss(g)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert ("gan" in record) == (gan > 0) and record["x0_gap"] > 0
        assert not gan or record["gan"] == pytest.approx(adversarial.item(), rel=1e-6)
        hand = torch.autograd.grad(x_hat, params, outer)
        loss.backward()
        assert without_gradient(stage.nets.fake_net, stage.teacher)
        for p, h in zip(params, hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.student.zero_grad()
    if gan:  # the two terms differ, so that neither is lost in the sum
        assert torch.autograd.grad(adversarial, x_hat, retain_graph=True)[0].abs().max() > 1e-8


@pytest.mark.parametrize("more", [[], ["gan=0"], ["gan_critic=0.4", "student=full"]], ids=" ".join)
def test_the_critic_s_loss(words, more):
    """Flow matching on the student's clips, and the discriminator on them and real ones with the same t and noise."""
    stage = make(*words, *more)
    given = dict(m.split("=") for m in more)
    gan, weight = float(given.get("gan", 5e-3)), float(given.get("gan_critic", 1e-2))
    critic = copy.deepcopy(stage.nets.fake_net)
    for c in (0, 3):
        batch = DOUBLE(c)
        x_hat, gen = clips(stage, 6, c, batch)
        t, x = times(gen), x_hat.detach()
        noise = normal_like(x, gen)
        if gan:
            v, fake = judged(critic, noised(x, t, noise), t, batch.cond)
            _, real = judged(critic, noised(batch.x0, t, noise), t, batch.cond)
            flow = (v - (noise - x)).square().mean()
            judging = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
            wanted = flow + weight * judging
        else:
            wanted = (critic(noised(x, t, noise), t, batch.cond) - (noise - x)).square().mean()
        loss, record = stage.critic_loss(c)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        if gan:
            assert record["flow"] == pytest.approx(flow.item(), rel=1e-6)
            assert record["gan"] == pytest.approx(judging.item(), rel=1e-6)
            assert record["real"] == pytest.approx(torch.sigmoid(real).mean().item(), rel=1e-6)
            assert record["generated"] == pytest.approx(torch.sigmoid(fake).mean().item(), rel=1e-6)
        hand = torch.autograd.grad(wanted, list(critic.parameters()))
        loss.backward()
        assert with_gradient(stage.nets.fake_net) and without_gradient(stage.student, stage.teacher)
        for p, h in zip(stage.nets.fake_net.parameters(), hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.nets.fake_net.zero_grad()


def test_what_the_networks_start_from(words):
    x_t, t, cond, _ = small_wan().example_inputs(2)
    teacher, stage2 = small_wan(seed=TEACHER)(x_t, t, cond), small_wan(seed=STAGE2)(x_t, t, cond, KEPT)
    for more, student, critic in (
        ([], stage2, teacher),
        (["fake_arch=pruned"], stage2, stage2),
        (["student=full"], teacher, teacher),
        (["student=full", "fake_arch=pruned"], teacher, teacher),
    ):
        stage = built(*words, *more, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(stage.student(x_t, t, cond), student)
            assert torch.equal(stage.nets.fake(x_t, t, cond), critic)
            assert torch.equal(stage.teacher(x_t, t, cond), teacher)
        values = dict(stage.roles["fake"].file_values())  # the masters of a bfloat16 run
        wanted = stage.nets.fake_net.state_dict()
        assert values.keys() == wanted.keys() and all(torch.equal(values[k], wanted[k]) for k in wanted)


def test_constant_weights_come_back(words):
    critic = built(*words).nets.fake_net
    critic.blocks[1].register_full_backward_hook(lambda *_: pytest.fail("a backward hook ran"))
    critic.proj_out.requires_grad_(False)
    x_t, t, cond, _ = critic.example_inputs(2, size=(2, 4, 4))
    before = [p.requires_grad for p in critic.parameters()]
    with constant(critic):
        assert not any(p.requires_grad for p in critic.parameters())
        x = x_t.double().requires_grad_(True)
        (g,) = torch.autograd.grad(critic(x, t, cond.map(lambda v: v.double())).sum(), x)
    assert g.abs().max() > 0 and [p.requires_grad for p in critic.parameters()] == before
    assert critic.blocks[1]._backward_hooks and without_gradient(critic)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["gan=0"],
        ["guidance=1"],
        ["student=full", "gan_features=2"],
        ["fake_arch=pruned", "checkpointing=true", "keep_attention=1"],
    ],
    ids=" ".join,
)
def test_the_planner_counts_a_real_iteration(words, more):
    """One update of the student and two of the critic, whose walk has two batches; a ladder of one step."""
    stage = built(*words, *more, "steps=1", "count=generator", dtype=torch.float32)
    cost = compare_with_plan(stage)
    kept, judging = stage.student.num_blocks, stage.nets.fake_net.num_blocks
    teacher = (1 if "guidance=1" in more else 2) * BLOCKS
    critic = 3 * judging if "gan=0" in more else 5 * judging  # student's update: 1; critic's two updates: 1 or 2 each
    assert cost.total("calls") == 3 * kept + teacher + critic
