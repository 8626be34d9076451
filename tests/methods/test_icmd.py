"""method=icmd against its formulas in float64, with heads written out tap by tap; its walks against real steps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import BLOCKS, KEPT, batches, small_wan, write_ranking
from method_cases import (
    TEACHER,
    built,
    compare_with_plan,
    hidden_states,
    moved,
    noised,
    planned,
    with_gradient,
    without_gradient,
    write_models,
)

from fastlightgen.methods.icmd import icd_loss, instance_times, judge_loss, mca_loss, paired
from fastlightgen.rng import generator, normal_like, share
from fastlightgen.stages.frame_heads import Convolutions, arranged, read_blocks

DOUBLE = batches(2, torch.float64)
GRID = (2, 2, 2)  # tokens of a cropped clip: two frames of 4 x 4 latents, patches of 2 x 2
ALL = ["mca_start=0", "mca_every=2"]  # the adversarial loss from the first step; heads on blocks 1 and 3


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    teacher = next(w for w in write_models(root) if w.startswith("model="))
    return ["stage=2", "method=icmd", teacher, f"importance={write_ranking(root / 'importance.json')}"]


def test_the_losses_by_hand():
    real, fake = torch.tensor([[0.5, -2.0, 3.0]]).double(), torch.tensor([[1.0, -3.0, -0.5]]).double()
    assert judge_loss(real, fake).item() == pytest.approx((0.5 + 3 + 0) / 3 + (2 + 0 + 0.5) / 3, rel=1e-12)
    wanted = -sum(math.log(1 / (1 + math.exp(-x))) for x in (1, -3, -0.5)) / 3
    assert mca_loss(fake).item() == pytest.approx(wanted, rel=1e-12)


def test_the_distance_of_layers_by_hand():
    """A mean for each layer, a sum over layers; the gradient of the mean, and none for the teacher."""
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([1.0, 3.0], [2.0, 0.0, 0.0, -2.0]))
    c, d = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.0, 0.0], [1.0, 1.0, 0.0, 0.0]))
    loss = icd_loss([a, b], [c, d])
    assert loss.item() == (1 + 9) / 2 + (1 + 1 + 0 + 4) / 4
    (3 * loss).backward()
    assert a.grad.tolist() == [3.0, 9.0] and b.grad.tolist() == [1.5, -1.5, 0.0, -3.0]
    assert c.grad is None and d.grad is None


def test_which_layers_follow_which():
    """Kept 0, 3, 5 of 8: the output of 0 becomes the input of 3, which in the teacher is the output of 2."""
    assert paired([0, 3, 5], 8, "next_input") == [2, 4, 7] and paired([0, 3, 5], 8, "same_index") == [0, 3, 5]
    assert paired(range(4), 4, "next_input") == [0, 1, 2, 3]
    assert read_blocks(40, 4) == [3, 7, 11, 15, 19, 23, 27, 31, 35, 39] and read_blocks(3, 4) == [2]


def test_the_times_of_the_instance_noise():
    """log s ~ N(-1, 1): the median of t' is s / (1 + s) at s = 1/e, the quartiles at 0.6745 deviations from it."""
    t = instance_times(20000, -1.0, 1.0, generator(0)).sort().values
    for part, z in ((0.25, -0.67449), (0.5, 0.0), (0.75, 0.67449)):
        s = math.exp(-1 + z)
        assert t[int(part * 20000)].item() == pytest.approx(s / (1 + s), abs=0.006)  # three deviations of a quantile
    assert t.min() >= 0.001 and t.max() <= 0.999
    torch.testing.assert_close(t * 1000, (t * 1000).round(), rtol=0, atol=1e-3)
    assert instance_times(2, 50.0, 0.0, generator(0)).tolist() == pytest.approx([0.999, 0.999])
    assert instance_times(2, -50.0, 0.0, generator(0)).tolist() == pytest.approx([0.001, 0.001])


def taps(x, conv, axes: int):
    """A convolution of [N, C, ...] as a sum over its taps of shifted copies."""
    pad = F.pad(x, [1, 1] * axes)
    out = torch.zeros_like(x[:, :1]).repeat(1, len(conv.bias), *[1] * axes)
    for at in torch.cartesian_prod(*[torch.arange(3)] * axes).reshape(-1, axes).tolist():
        part, weight = pad, conv.weight
        for axis, n in enumerate(at):
            part, weight = part.narrow(axis + 2, n, x.shape[axis + 2]), weight.select(2, n)
        out = out + torch.einsum("oc,nc...->no...", weight, part)
    return out + conv.bias.view(1, -1, *[1] * axes)


def convolved(x, made: Convolutions, axes: int):
    """The logits of one head, written out; GroupNorm over 8 groups of channels and all places of a sample."""
    x = taps(x, made.conv, axes)
    groups = x.unflatten(1, (8, -1))
    over = tuple(range(2, groups.dim()))
    mean = groups.mean(over, keepdim=True)
    x = ((groups - mean) / ((groups - mean).square().mean(over, keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
    shape = (1, -1, *[1] * axes)
    x = x * made.norm.weight.view(shape) + made.norm.bias.view(shape)
    x = x / (1 + torch.exp(-x))
    return torch.einsum("oc,nc...->no...", made.out.weight.flatten(1), x) + made.out.bias.view(shape)


def judged(teacher, x_t, t, cond):
    """The logits of all heads [heads, B, tokens], written out from the hidden states of the teacher."""
    _, hidden = hidden_states(teacher, x_t, t, cond)
    logits = []
    for block, head in zip((1, 3), teacher.discriminator.heads, strict=True):
        h = hidden[block]
        h = (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = (h * head.norm.weight + head.norm.bias) @ head.token.weight.T + head.token.bias
        h = h.view(2, *GRID, -1)
        space = [
            [convolved(h[b, f].permute(2, 0, 1)[None], head.spatial, 2).flatten() for f in range(2)] for b in (0, 1)
        ]
        logits.append(torch.stack([torch.cat(row) for row in space]))
        rows = []
        for b in range(2):
            places = [[convolved(h[b, :, i, j].T[None], head.temporal, 1).flatten() for j in (0, 1)] for i in (0, 1)]
            rows.append(torch.stack([torch.stack(line) for line in places]).permute(2, 0, 1))
        logits.append(torch.stack(rows).flatten(1))
    return torch.stack(logits)


def drawn(step: int, batch):
    """x_t, t, noise, prompts, t' and instance noise of a step, by hand."""
    gen = generator(0, 20, step)
    u = torch.rand(2, generator=gen).clamp(1e-4, 1)
    t = (3 * u / (1 + 2 * u)).double()
    empty = torch.rand(2, generator=gen) < 0.5
    texts = torch.where(empty[:, None, None], batch.null.text, batch.cond.text)
    noise = normal_like(batch.x0, gen)
    cond = batch.cond.map(lambda x: texts if x is batch.cond.text else x)
    again = generator(0, 22, step)
    s = (0.3 * torch.randn(2, generator=again) - 0.5).exp()
    instance = ((1000 * s / (1 + s)).round() / 1000).double()
    return noised(batch.x0, t, noise), t, noise, cond, instance, normal_like(batch.x0, again)


MORE = ["text_dropout=0.5", "mca_mean=-0.5", "mca_std=0.3"]
VARIANTS = [
    [*ALL],
    [*ALL, "mca=0.3", "icd=2", "pair=same_index", "checkpointing=true"],
    ["mca=0"],
    [*ALL, "icd=0"],
    ["mca_every=2", "mca_start=0.3"],
]


@pytest.mark.parametrize("more", VARIANTS, ids=" ".join)
def test_the_student_s_gradient(words, more):
    """Eq. 6: the data, the hidden states of every kept block, and -log D through the teacher, in one graph."""
    stage = built(*words, *MORE, *more, "iters=10")
    moved(stage.student, seed=3)
    given = dict(m.split("=") for m in more)
    icd, mca = float(given.get("icd", 0.1)), float(given.get("mca", 1))
    followed = KEPT if given.get("pair") == "same_index" else [2, 3]
    teacher = copy.deepcopy(stage.teacher)
    params = list(stage.student.parameters())
    for step in (2, 3):
        batch = DOUBLE(step)
        x_t, t, noise, cond, at, instance = drawn(step, batch)
        v, own = hidden_states(stage.student, x_t, t, cond)
        _, theirs = hidden_states(teacher, x_t, t, cond)
        task = (v - (noise - batch.x0)).square().mean()
        layers = sum((h - theirs[i].detach()).square().mean() for h, i in zip(own, followed, strict=True))
        wanted = task + icd * layers
        late = mca > 0 and not (given.get("mca_start") == "0.3" and step < 3)
        if late:
            x0 = x_t - t.view(-1, 1, 1, 1, 1) * v
            adversarial = torch.log(1 + torch.exp(-judged(teacher, noised(x0, at, instance), at, cond))).mean()
            wanted = wanted + mca * adversarial
        loss, record = stage.student_update(step)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert record["task"] == pytest.approx(task.item(), rel=1e-6)
        assert record["icd"] == pytest.approx(layers.item(), rel=1e-6)
        assert ("mca" in record) == late and (not late or record["mca"] == pytest.approx(adversarial.item(), rel=1e-6))
        hand = torch.autograd.grad(wanted, params)
        loss.backward()
        assert with_gradient(stage.student) and without_gradient(stage.teacher)
        for p, h in zip(params, hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.student.zero_grad()
        assert [u.role for u in stage.updates(step)] == ["student"] + ["discriminator"] * late


def test_the_discriminator_s_loss_and_gradient(words):
    """The hinge loss on the student's and the teacher's clips with the same t' and noise; it trains the heads alone."""
    stage = built(*words, *MORE, *ALL)
    moved(stage.student, seed=3)
    moved(stage.judge, by=0.3)
    teacher = copy.deepcopy(stage.teacher)
    params = list(teacher.discriminator.parameters())
    for step in (0, 3):
        batch = DOUBLE(step)
        x_t, t, _, cond, at, instance = drawn(step, batch)
        clips = [(x_t - t.view(-1, 1, 1, 1, 1) * net(x_t, t, cond)).detach() for net in (stage.student, teacher)]
        fake, real = (judged(teacher, noised(x, at, instance), at, cond) for x in clips)
        wanted = (1 + fake).clamp(min=0).mean() + (1 - real).clamp(min=0).mean()
        student, judge = stage.updates(step)
        student.loss()
        loss, record = judge.loss()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        assert record["real"] == pytest.approx(real.mean().item(), rel=1e-6)
        assert record["generated"] == pytest.approx(fake.mean().item(), rel=1e-6)
        hand = torch.autograd.grad(wanted, params)
        loss.backward()
        assert without_gradient(stage.student, stage.teacher.blocks, stage.teacher.patch_embedding)
        for p, h in zip(stage.judge.parameters(), hand, strict=True):
            torch.testing.assert_close(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        stage.judge.zero_grad()
        assert not stage.made  # the clips of a step are used once


def test_parts_of_a_batch_meet_their_own_clips(words):
    """With micro-batches the discriminator sees the clips of the same part: its loss is that of the whole batch."""
    losses = []
    for parts in (1, 2):
        stage = built(*words, *ALL)
        whole = DOUBLE(0)
        cut = lambda k, n: lambda x: x[k * 2 // n : (k + 1) * 2 // n] if len(x) == 2 else x  # noqa: E731
        total = 0.0
        student, judge = stage.updates(0)
        for update in (student, judge):
            for k in range(parts):
                part = type(whole)(cut(k, parts)(whole.x0), *(c.map(cut(k, parts)) for c in (whole.cond, whole.null)))
                stage.batches = lambda step, part=part: part
                with share(k, parts):
                    loss = update.loss()[0].item()
                total += (update is judge) * loss / parts
        losses.append(total)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_what_the_networks_start_from(words, tmp_path):
    stage = built(*words, dtype=torch.float32)
    x_t, t, cond, _ = small_wan().example_inputs(2)
    teacher = small_wan(seed=TEACHER)
    with torch.no_grad():
        assert torch.equal(stage.student(x_t, t, cond), teacher(x_t, t, cond, KEPT))
        assert torch.equal(stage.teacher(x_t, t, cond), teacher(x_t, t, cond))
    roles = stage.roles
    assert roles["discriminator"].host is stage.teacher and stage.frozen == []
    assert roles["discriminator"].lr == 2 * roles["student"].lr
    assert built(*words, "lr_discriminator=0.5").roles["discriminator"].lr == 0.5
    plain = built(*words, "mca=0")
    assert list(plain.roles) == ["student"] and plain.frozen == [plain.teacher] and plain.loss_key == "task"


def test_tokens_of_several_processes_come_into_order():
    """Processes divide the rows; the tokens of each follow each other."""

    class Cut:
        axis, sizes, tokens = 1, [2, 1], [2 * 2 * 5, 2 * 1 * 5]

    whole = torch.arange(2.0 * 3 * 5).view(1, 2, 3, 5, 1)
    shuffled = torch.cat([whole[:, :, :2].reshape(1, -1, 1), whole[:, :, 2:].reshape(1, -1, 1)], 1)
    sequence = type("Sequence", (), {"cut": lambda self, grid: Cut})()
    assert torch.equal(arranged(shuffled, (2, 3, 5), sequence), whole)
    assert torch.equal(arranged(whole.view(1, -1, 1), (2, 3, 5), None), whole)


@pytest.mark.parametrize("more", [[*ALL], ["mca=0"], [*ALL, "checkpointing=true"]], ids=" ".join)
def test_the_planner_counts_a_real_step(words, more):
    stage = built(*words, *more, dtype=torch.float32)
    cost = compare_with_plan(stage)
    kept, judging = len(KEPT), 0 if "mca=0" in more else BLOCKS
    assert cost.total("grad_calls") == kept + judging and cost.total("calls") == kept + BLOCKS + 3 * judging


def test_the_planner_weighs_the_adversarial_steps(words):
    """70% of the steps have it; the rest is the student's and the teacher's prediction."""
    late, early, all_ = (planned(built(*words, "iters=10", *m)) for m in ([], ["mca=0"], ["mca_start=0"]))
    mean = 0.3 * early.total("flops") + 0.7 * all_.total("flops")
    assert late.total("flops") == pytest.approx(mean, rel=1e-12)
    assert late.updates == {"student": 1, "discriminator": 0.7}
