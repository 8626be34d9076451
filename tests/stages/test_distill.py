"""Stage III against Eq. 8 and 9 written out sample by sample in float64; the schedule of its updates."""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers import KEPT, batches, config, small_wan

from fastlightgen import flow
from fastlightgen.config import ConfigError, load
from fastlightgen.engine.local import LocalEngine
from fastlightgen.models.folder.weights import save_model
from fastlightgen.models.lora import LoraLinear
from fastlightgen.ops import dmd_gradient
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import distill, guided
from fastlightgen.stages.build import Builder
from fastlightgen.stages.distill import dmd_loss

DOUBLE = batches(2, torch.float64)
CPU = torch.device("cpu")


class DoubleSource:
    name, description = "test", {}

    def batch(self, step: int, size: int, rows=None):
        return batches(size, torch.float64)(step)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_model(small_wan(seed=1), root / "stage2", pruned_path=KEPT, source="there")
    save_model(small_wan(seed=2), root / "teacher")
    return [f"stage2_model={root / 'stage2'}", f"model={root / 'teacher'}"]


def built(cfg):
    """Build the stage as the train command does."""
    return distill.build(cfg, Builder(cfg, DoubleSource(), CPU))


def make(folders, *words: str, moved: float = 0.05):
    """Return a stage in float64 whose student and critic differ from the Stage II network."""
    stage = built(config(3, *folders, "lora_rank=3", *words))
    nets, gen = stage.nets, torch.Generator().manual_seed(1)
    for net in filter(None, (nets.student, nets.teacher, nets.fake_net, nets.original)):
        net.double()
    with torch.no_grad():
        for p in (*nets.student.parameters(), *nets.fake_trained.parameters()):
            p += moved * torch.randn(p.shape, generator=gen, dtype=p.dtype)
    return stage


def merged(nets):
    """Return the critic as a plain network: adapters multiplied into the weights, skipped blocks deleted."""
    net = copy.deepcopy(nets.fake_net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLinear):
                child.base.weight.data += child.up.data @ child.down.data
                setattr(module, name, child.base)
    return net if nets.fake_keep is None else net.prune(nets.fake_keep)


def exit_rung(cfg, purpose, number, gen):
    if cfg.rungs == "random":
        return int(torch.randint(cfg.steps, (), generator=gen))
    order = torch.randperm(cfg.steps, generator=generator(0, 12, purpose, number // cfg.steps))
    return order.tolist()[number % cfg.steps]


def roll(stage, batch, gen, j):
    """Backward simulation by hand down to rung j; only the last network call carries gradient."""
    cfg, student = stage.cfg, stage.nets.student
    tau = [3 * u / (1 + 2 * u) for u in (1 - i / cfg.steps for i in range(cfg.steps))]
    noise = normal_like(batch.x0, gen)
    if cfg.rollout == "data":
        x = (1 - tau[j]) * batch.x0 + tau[j] * noise
    else:
        x = noise
        for i in range(j):
            v = student(x, tau[i], batch.cond).detach()
            if cfg.sampler == "ode":
                x = x + (tau[i + 1] - tau[i]) * v
            else:
                x = (1 - tau[i + 1]) * (x - tau[i] * v) + tau[i + 1] * normal_like(x, gen)
    return x - tau[j] * student(x, tau[j], batch.cond)


def source(cfg, c: int, number: int, gen):
    """Return the clips and the draws of a rollout: those of critic update c, or of the shared walk `number`."""
    return (DOUBLE(number), generator(0, 13, number)) if cfg.rollouts == "shared" else (DOUBLE(c), gen)


def times(stage, gen):
    u = torch.rand(2, generator=gen).clamp(1e-4, 1)
    shift = stage.cfg.score_shift or 3.0
    return (shift * u / (1 + (shift - 1) * u)).clamp(*stage.cfg.t_clamp)


VARIANTS = [
    (),
    ("rollout=data", "steps=3", "rungs=random"),
    ("sampler=ode", "normaliser=none", "rungs=random"),
    ("rollouts=shared", "sampler=ode"),
    ("rollouts=shared", "rollout=data", "rungs=random"),
    ("fake_mode=lora", "score_shift=7"),
    ("fake_mode=lora", "fake_arch=full"),
    ("fake_arch=full", "strong=original", "beta1=1.5", "beta2=0.8"),
]


@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_student_gradient_is_that_of_eq_8(folders, words):
    stage = make(folders, "guidance_times=same", *words)
    cfg, nets, fake = stage.cfg, stage.nets, merged(stage.nets)
    strong, params = nets.original or nets.teacher, list(nets.student.parameters())
    for g in (0, 1, 2):  # the student's updates at iterations 0, 5, 10
        gen = generator(0, 5, 5 * g)
        j = exit_rung(cfg, 5, g, gen)
        batch, draws = source(cfg, 5 * g, g, gen)
        x_hat = roll(stage, batch, draws, j)
        x, t = x_hat.detach(), times(stage, gen)
        noise = normal_like(x, gen)
        beta1 = cfg.beta1 - cfg.a1 + (cfg.a1 + cfg.b1) * torch.rand(2, generator=gen).double()
        beta2 = cfg.beta2 - cfg.a2 + (cfg.a2 + cfg.b2) * torch.rand(2, generator=gen).double()
        wanted, gaps = [], []
        for b in range(2):  # one sample at a time, weak teacher as a network with fewer blocks
            cond, null = (c.map(lambda v, b=b: v[b : b + 1]) for c in (batch.cond, batch.null))
            x_t = (1 - t[b].double()) * x[b : b + 1] + t[b].double() * noise[b : b + 1]
            weak, at = copy.deepcopy(nets.teacher).prune(KEPT), t[b : b + 1]
            v_p, v_null, v_u = weak(x_t, at, cond), weak(x_t, at, null), strong(x_t, at, cond)
            v_real = beta1[b] * (v_p - v_null) + beta2[b] * (v_u - v_p) + v_null
            d = t[b].double() * (v_real - fake(x_t, at, cond))
            gaps.append(((x[b] - (x_t - t[b].double() * v_real)[0]).abs().mean() + 1e-6).item())
            if cfg.normaliser == "dmd":
                d = d / gaps[b]
            wanted.append(d[0].detach())
        d = torch.stack(wanted)
        hand = torch.autograd.grad(x_hat, params, d / d.numel(), allow_unused=True)
        loss, record = stage.student_loss(g)
        assert loss.item() == pytest.approx(0.5 * d.square().mean().item(), rel=1e-6)
        assert record["contrast"] == pytest.approx(x.flatten(1).std(1).mean().item())
        assert record["contrast_data"] == pytest.approx(batch.x0.flatten(1).std(1).mean().item())
        gap = pytest.approx(sum(gaps) / 2, rel=1e-6)
        assert {k: v for k, v in record.items() if "gap" in k} == {"x0_gap": gap, f"x0_gap_rung{j + 1}": gap}
        loss.backward()
        for p, h in zip(params, hand, strict=True):
            assert torch.allclose(p.grad, h, rtol=1e-5, atol=1e-9 + 1e-6 * h.abs().max().item())
        others = [p for n in (nets.teacher, nets.fake_net, nets.original) if n is not None for p in n.parameters()]
        assert all(p.grad is None for p in others)
        nets.student.zero_grad()


@pytest.mark.parametrize(
    "words",
    [
        ("guidance_times=below",),
        ("guidance_times=above", "normaliser=none", "score_shift=7"),
        ("guidance_times=below", "strong=original", "score_shift=7", "fake_mode=lora"),
    ],
    ids=" ".join,
)
def test_student_gradient_with_guidance_at_its_own_times(folders, words):
    """Matching t (v_pc + beta2 (v_uc - v_pc) - v_fake), guidance s (beta1 - 1) (v_pc - v_pn), one sample at a time."""
    stage = make(folders, *words)
    cfg, nets, fake = stage.cfg, stage.nets, merged(stage.nets)
    strong, weak, shift = nets.original or nets.teacher, copy.deepcopy(nets.teacher).prune(KEPT), cfg.score_shift or 3
    for g in range(4):  # every rung once
        gen = generator(0, 5, 5 * g)
        j, batch = exit_rung(cfg, 5, g, gen), DOUBLE(5 * g)
        x, t = roll(stage, batch, gen, j).detach(), times(stage, gen).double()
        noise = normal_like(x, gen)
        beta1 = cfg.beta1 - cfg.a1 + (cfg.a1 + cfg.b1) * torch.rand(2, generator=gen).double()
        beta2 = cfg.beta2 - cfg.a2 + (cfg.a2 + cfg.b2) * torch.rand(2, generator=gen).double()
        tau = 3 * (1 - j / 4) / (1 + 2 * (1 - j / 4))
        edge = tau / (shift - (shift - 1) * tau)  # the rung before the shift
        low, high = (0.0, edge) if "guidance_times=below" in words else (edge, 1.0)
        u = (low + (high - low) * torch.rand(2, generator=gen)).clamp(1e-4, 1)
        s = (shift * u / (1 + (shift - 1) * u)).clamp(*cfg.t_clamp).double()
        other, wanted = normal_like(x, gen), []
        for b in range(2):
            cond, null = (c.map(lambda v, b=b: v[b : b + 1]) for c in (batch.cond, batch.null))
            x_t, x_s = ((1 - v[b]) * x[b : b + 1] + v[b] * n[b : b + 1] for v, n in ((t, noise), (s, other)))
            v_p, v_u = weak(x_t, t[b : b + 1], cond), strong(x_t, t[b : b + 1], cond)
            target = v_p + beta2[b] * (v_u - v_p)
            matching = t[b] * (target - fake(x_t, t[b : b + 1], cond))
            v_p, v_null = weak(x_s, s[b : b + 1], cond), weak(x_s, s[b : b + 1], null)
            guidance = s[b] * (beta1[b] - 1) * (v_p - v_null)
            if cfg.normaliser == "dmd":
                matching /= (x[b] - (x_t - t[b] * target)[0]).abs().mean() + 1e-6
                guided = v_null + beta1[b] * (v_p - v_null)
                guidance /= (x[b] - (x_s - s[b] * guided)[0]).abs().mean() + 1e-6
            wanted.append((matching + guidance)[0].detach())
        loss, _ = stage.student_loss(g)
        assert loss.item() == pytest.approx(0.5 * torch.stack(wanted).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("words", [(), ("strong=original", "fake_mode=lora")], ids=str)
def test_the_two_parts_of_the_gradient_add_up_to_the_undivided_one(folders, words, monkeypatch):
    """At equal times and noise, without normaliser."""
    batch, gen = DOUBLE(0), torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, *batch.x0.shape, dtype=torch.float64, generator=gen)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    monkeypatch.setattr(guided, "renoised", lambda *_: (t, flow.add_noise(x0, noise, t), noise))
    made = []
    for kind in ("same", "below", "above"):
        stage = make(folders, f"guidance_times={kind}", "normaliser=none", *words)
        with torch.no_grad():
            made.append(guided.student_gradient(stage.cfg, stage.nets, x0, batch, 0.5, generator(0, 1))[0])
    assert made[0].dtype == torch.float64 and made[0].abs().max() > 1e-3
    for parts in made[1:]:
        torch.testing.assert_close(parts, made[0], rtol=1e-10, atol=1e-12 * made[0].abs().max().item())


def test_guidance_times_stay_on_their_side_of_the_rung(folders, monkeypatch):
    """With batch=8, 32 updates: 64 times for each rung; they fill their range up to the clamp of the scores' times."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(guided, "dmd_gradient", lambda *given: seen.append(given[2]) or dmd_gradient(*given))
    for kind in ("below", "above"):
        seen.clear()
        stage = make(folders, f"guidance_times={kind}", "batch=8")
        stage.rollouts.simulate = lambda batch, rung, gen: batch.x0.clone().requires_grad_(True)
        rungs = [stage.rollouts.rung(5, g, generator(0)) for g in range(32)]
        for g in range(32):
            stage.student_loss(g)
        for j, tau in enumerate(stage.times):
            t = torch.cat([v for g, v in enumerate(seen[1::2]) if rungs[g] == j])
            low, high = (0.02, min(tau, 0.98)) if kind == "below" else (min(tau, 0.98), 0.98)
            assert t.shape == (64,) and low <= t.min() + 1e-6 and t.max() <= high + 1e-6
            width = high - low
            assert t.min() <= low + 0.2 * width and t.max() >= high - 0.2 * width
        matching = torch.cat(seen[::2])
        assert matching.min() < 0.2 and matching.max() > 0.95  # the other part keeps the whole range


@pytest.mark.parametrize("words", VARIANTS[:-1], ids=" ".join)
def test_critic_loss_is_flow_matching_on_the_student_s_clips(folders, words):
    stage = make(folders, *words)
    fake = merged(stage.nets)
    for c in (0, 3):
        gen = generator(0, 6, c)
        j = exit_rung(stage.cfg, 6, c, gen)
        batch, draws = source(stage.cfg, c, 1, gen)
        x, t = roll(stage, batch, draws, j).detach(), times(stage, gen)
        noise = normal_like(x, gen)
        at = t.double().view(-1, 1, 1, 1, 1)
        v = fake((1 - at) * x + at * noise, t, batch.cond)
        loss, _ = stage.critic_loss(c)
        assert loss.item() == pytest.approx(((v - (noise - x)) ** 2).mean().item(), rel=1e-6)
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in stage.nets.fake_trained.parameters())
        trained = {id(p) for p in stage.nets.fake_trained.parameters()}
        idle = [p for n in (stage.nets.student, stage.nets.teacher) for p in n.parameters() if id(p) not in trained]
        assert all(p.grad is None for p in idle)


def test_dmd_loss_has_the_wanted_gradient():
    gen = torch.Generator().manual_seed(0)
    x_hat = torch.randn(2, 3, 4, dtype=torch.float64, generator=gen, requires_grad=True)
    g = torch.randn(2, 3, 4, dtype=torch.float64, generator=gen)
    dmd_loss(x_hat, g).backward()
    assert torch.allclose(x_hat.grad, g / 24, rtol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_descending_with_this_sign_reaches_the_data_and_the_other_leaves_it(sign):
    """Data N(0, 1), generator phi + N(0, 1) with phi = 2 at first, scores in closed form: phi must go to 0."""
    phi, gen = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), torch.Generator().manual_seed(0)

    def v(x_t, t, mean):  # E[noise - x0 | x_t] for x0 ~ N(mean, 1)
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * (x_t - (1 - t) * mean) - mean

    for _ in range(200):
        x_hat = phi + torch.randn(64, 1, dtype=torch.float64, generator=gen)
        t = torch.rand(64, generator=gen, dtype=torch.float64).clamp(0.02, 0.98)
        noise = torch.randn(64, 1, dtype=torch.float64, generator=gen)
        x_t = flow.add_noise(x_hat.detach(), noise, t)
        real, fake = (v(x_t, t[:, None], m) for m in (0.0, phi.item()))
        g, _ = dmd_gradient(x_hat.detach(), x_t, t, fake, real, real, real, 1.0, 1.0)
        (d,) = torch.autograd.grad(dmd_loss(x_hat, sign * g), phi)
        with torch.no_grad():
            phi -= 0.05 * d
    assert abs(phi.item()) < 0.2 if sign == 1 else phi.item() > 3


def test_schedule_of_updates(folders):
    def roles(stage, steps):
        return [[u.role for u in stage.updates(k)] for k in range(steps)]

    outer = make(folders, "ratio=5")
    assert roles(outer, 11) == [["student", "fake"] if k % 5 == 0 else ["fake"] for k in range(11)]
    counted = make(folders, "ratio=3", "count=generator")
    assert roles(counted, 2) == [["student", "fake", "fake", "fake"]] * 2
    seen = []
    counted.rollouts.batches = lambda step: seen.append(step) or DOUBLE(0)
    for k in range(2):
        for update in counted.updates(k)[1:]:
            update.loss()
    assert seen == list(range(6))  # every critic update has its own clips


@pytest.mark.parametrize("count", ["outer", "generator"])
def test_critic_only_start(folders, count):
    """critic_start updates of the critic come before the student's first; the iterations that they take count."""
    stage = make(folders, "ratio=3", "critic_start=6", f"count={count}")
    made = [[u.role for u in stage.updates(k)] for k in range(12)]
    each = 1 if count == "outer" else 3
    assert made[: 6 // each] == [["fake"] * each] * (6 // each)
    rest = [role for roles in made[6 // each :] for role in roles]
    assert rest == (["student", "fake", "fake", "fake"] * 12)[: len(rest)]
    numbers = [u.loss.args[0] for k in range(12) for u in stage.updates(k) if u.role == "student"]
    assert numbers == list(range(len(numbers))) and len(numbers) >= 2  # the student's updates count from 0


def test_a_start_that_never_ends_is_refused(folders):
    for words, message in (
        (["critic_start=7"], "critic_start=7: wanted a multiple of ratio=5; give critic_start=5"),
        (
            ["critic_start=20", "iters=20"],
            "critic_start=20: iters=20 leaves no update of the student, which follows 20 of the critic; give "
            "critic_start=0, or iters=21 or more",
        ),
        (
            ["critic_start=20", "iters=4", "count=generator"],
            "critic_start=20: iters=4 leaves no update of the student, which follows 20 of the critic; give "
            "critic_start=0, or iters=5 or more",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            config(3, *folders, *words)
    config(3, *folders, "critic_start=20", "iters=21")
    config(3, *folders, "critic_start=20", "iters=5", "count=generator")
    for model, said in (
        ("tiny", "iters=21 or more (critic_start comes from configs/model/tiny.yaml)"),
        ("wan2.1-t2v-1.3b", "iters=101 or more (critic_start comes from configs/stage3.yaml)"),
    ):
        with pytest.raises(ConfigError, match=f"{re.escape(said)}$"):
            load(["stage=3", f"model={model}", "iters=20"])


@pytest.mark.parametrize("words", [[], ["critic_start=4"], ["count=generator", "critic_start=4"]], ids=" ".join)
def test_shared_clips_are_those_of_the_current_student(folders, words):
    """While student and critic train, every update sees what the student makes now; a cycle has one batch."""
    stage = make(folders, "rollouts=shared", "ratio=2", "lr=0.01", "lr_fake=0.01", *words)
    rollouts, prompts, seen = stage.rollouts, [], []
    rollouts.batches = lambda step: prompts.append(step) or DOUBLE(step)
    made = rollouts.for_student, rollouts.for_critic

    def spy(which, purpose):
        def clips(number, gen):
            got, j = made[which](number, gen), exit_rung(stage.cfg, purpose, number, gen)
            wanted = roll(stage, DOUBLE(prompts[-1]), generator(0, 13, prompts[-1]), j)
            assert torch.equal(got.x_hat, wanted) and got.x_hat.requires_grad == (purpose == 5)
            seen.append((purpose, prompts[-1]))
            return got

        return clips

    rollouts.for_student, rollouts.for_critic = spy(0, 5), spy(1, 6)
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    for step in range(4 if "count=generator" in words else 8):
        for update in stage.updates(step):
            engine.apply(update, step)
    start = [(5, 0)] if not words else []  # the first student has a walk of its own if no critic came before it
    first = 0 if words else 1
    cycles = [(role, k) for k in range(first, 4 + first) for role in (6, 6, 5)]
    if words:  # 4 updates of the critic first: two walks, the student takes the second one
        cycles.remove((5, 0))
    assert seen == (start + cycles)[: len(seen)] and len(seen) >= 9
    assert prompts == sorted(set(prompts))  # each walk reads its batch once


@pytest.mark.parametrize(
    "words, lr",
    [([], 4e-7), (["fake_mode=lora"], 5e-5), (["lr_fake=3e-6"], 3e-6), (["fake_mode=lora", "lr_fake=3e-6"], 3e-6)],
    ids=str,
)
def test_the_critic_has_the_learning_rate_of_its_mode(folders, words, lr, capsys):
    stage = make(folders, *words, "lr=1e-6")
    assert (stage.roles["student"].lr, stage.roles["fake"].lr) == (1e-6, lr)
    assert f"learning rates: student 1e-06, critic {lr:g}\n" in capsys.readouterr().out
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    assert engine.apply(stage.updates(1)[0], 1)["fake_lr"] == lr


@pytest.mark.parametrize("mode", ["copy", "lora"])
def test_training_moves_only_the_trained(folders, mode):
    stage = make(
        folders, f"fake_mode={mode}", "strong=original", "ratio=1", "lr=0.01", "lr_fake=0.01", "weight_decay=0.5"
    )
    nets = stage.nets
    trained = {id(p) for n in (nets.student, nets.fake_trained) for p in n.parameters()}
    frozen = [p for n in (nets.teacher, nets.fake_net, nets.original) for p in n.parameters() if id(p) not in trained]
    before, student = [p.clone() for p in frozen], copy.deepcopy(nets.student.state_dict())
    engine = LocalEngine(CPU, "float32")
    engine.prepare(stage)
    for step in range(2):
        for update in stage.updates(step):
            engine.apply(update, step)
    assert all(
        torch.equal(p, b) and p.grad is None and not p.requires_grad for p, b in zip(frozen, before, strict=True)
    )
    assert all(not torch.equal(v, student[k]) for k, v in nets.student.state_dict().items())


def test_what_the_networks_start_from(folders):
    """Student and critic start bit-equal to the Stage II network's pruned path; fresh adapters change nothing."""
    x_t, t, cond, _ = small_wan().example_inputs(2)
    for words in (("fake_mode=copy",), ("fake_mode=lora",), ("fake_arch=full",), ("fake_mode=lora", "fake_arch=full")):
        stage = make(folders, *words, moved=0.0)
        nets, x = stage.nets, x_t.double()
        wanted = nets.teacher(x, t, cond, KEPT)
        assert torch.equal(nets.student(x, t, cond), wanted) and nets.student.num_blocks == len(KEPT)
        assert torch.equal(nets.fake(x, t, cond), nets.teacher(x, t, cond) if "fake_arch=full" in words else wanted)
        assert (nets.fake_net is nets.teacher) == ("fake_mode=lora" in words)


def rungs(folders, monkeypatch, count: int, *words: str, moved: float = 0.05) -> list[int]:
    """Return the rungs at which `count` updates of the student leave the ladder, from the times of its network."""
    stage = make(folders, *words, moved=moved)
    batch, seen = batches(stage.cfg.batch)(0), []
    stage.rollouts.batches = lambda step: batch
    monkeypatch.setattr(flow, "rollout", lambda predict, x, times, *rest: seen.append(times[-1]) or x)
    for g in range(count):
        stage.rollouts.for_student(g, generator(stage.cfg.seed, 5, 5 * g))
    monkeypatch.undo()
    return [stage.times.index(t) for t in seen]


def test_cycled_rungs_get_equally_many_updates(folders, monkeypatch):
    """Every cycle of 4 updates has each rung once, in changing orders."""
    found = rungs(folders, monkeypatch, 48)
    cycles = [tuple(found[i : i + 4]) for i in range(0, 48, 4)]
    assert all(sorted(cycle) == [0, 1, 2, 3] for cycle in cycles) and len(set(cycles)) > 4
    assert {rung for g, rung in enumerate(found) if g % 2 == 0} == {0, 1, 2, 3}  # the log may show every second update
    assert sorted(rungs(folders, monkeypatch, 3, "steps=3")) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["cycled", "random"])
def test_exit_rung_depends_on_seed_and_update_alone(folders, monkeypatch, kind):
    a = rungs(folders, monkeypatch, 40, f"rungs={kind}")
    assert a == rungs(folders, monkeypatch, 40, f"rungs={kind}", "batch=5", "fake_mode=lora", moved=0.5)
    assert a == rungs(folders, monkeypatch, 40, f"rungs={kind}", "rollout=data")
    assert a != rungs(folders, monkeypatch, 40, f"rungs={kind}", "seed=1")


def test_random_rungs_are_uniform(folders, monkeypatch):
    found = rungs(folders, monkeypatch, 200, "rungs=random")
    counts = [found.count(j) for j in range(4)]
    assert all(abs(c - 50) < 3 * (200 * 3 / 16) ** 0.5 for c in counts), counts  # three standard deviations


@pytest.mark.parametrize("steps", range(1, 9))
def test_ladders(folders, tmp_path, steps):
    stage = make(folders, f"steps={steps}", "shift=5")
    wanted = [5 * u / (1 + 4 * u) for u in (1 - i / steps for i in range(steps))]
    assert stage.times == pytest.approx(wanted) and stage.times[0] == 1
    assert stage.student_loss(0)[0].item() > 0


def test_betas_and_times_stay_inside_their_ranges_per_sample(folders, monkeypatch):
    stage, seen = (
        make(folders, "guidance_times=same", "batch=8", "beta1=2", "a1=1", "b1=0.5", "beta2=0.3", "a2=0.1", "b2=0.2"),
        [],
    )
    stage.rollouts.simulate = lambda batch, rung, gen: batch.x0.clone().requires_grad_(True)

    def spy(x0, x_t, t, *rest):
        seen.append((t, *rest[-2:]))
        return dmd_gradient(x0, x_t, t, *rest)

    monkeypatch.setattr(guided, "dmd_gradient", spy)
    for g in range(25):
        stage.student_loss(g)
    t, beta1, beta2 = (torch.cat(column) for column in zip(*seen, strict=True))
    for x, low, high in ((t, 0.02, 0.98), (beta1, 1.0, 2.5), (beta2, 0.2, 0.5)):
        assert x.shape == (200,) and low <= x.min() and x.max() <= high + 1e-6
        assert x.min() < low + 0.1 * (high - low) and x.max() > high - 0.1 * (high - low)  # and fill them
    assert all(len(set(row[1].tolist())) == 8 for row in seen)
    assert abs(torch.corrcoef(torch.stack([beta1, beta2]))[0, 1]) < 0.25


def test_build_says_what_is_missing(folders, tmp_path):
    with pytest.raises(ValueError, match="there is no Stage II model; run stage=2"):
        built(config(3, folders[1], f"run={tmp_path}"))
    with pytest.raises(ValueError, match="names no pruned_path; wanted a model that stage=2 made"):
        built(config(3, folders[1], folders[1].replace("model=", "stage2_model=")))


def test_the_student_starts_from_another_model_of_the_same_network(folders, tmp_path):
    stage2 = Path(folders[0].split("=")[1])

    def saved(name: str, net, keep) -> Path:
        return save_model(net, tmp_path / name, pruned_path=keep)

    other = saved("other", small_wan(seed=3), KEPT)
    stage, (x_t, t, cond, _) = built(config(3, *folders, f"start_model={other}")), small_wan().example_inputs(2)
    with torch.no_grad():
        for net, seed in ((stage.nets.student, 3), (stage.nets.fake_net, 1)):
            assert torch.equal(net(x_t, t, cond), small_wan(seed=seed)(x_t, t, cond, KEPT))
        assert torch.equal(stage.nets.teacher(x_t, t, cond), small_wan(seed=1)(x_t, t, cond))
    values = dict(stage.roles["student"].file_values())  # masters of a bfloat16 run
    wanted = small_wan(seed=3).prune(KEPT).state_dict()
    assert values.keys() == wanted.keys() and all(torch.equal(values[k], wanted[k]) for k in wanted)

    for start, message in (
        (tmp_path / "none", "start_model=.*none: there is no model folder; give one that stage=2 made"),
        (
            saved("deep", small_wan(blocks=5), KEPT),
            f"start_model=.*deep: num_layers is 5, wanted 4 as in {stage2}; give a model of the same network",
        ),
        (
            saved("path", small_wan(), [0, 1]),
            r"start_model=.*path: its pruned path keeps blocks \[0, 1\], wanted \[0, 3\] as in .*stage2; "
            "give a model that was made with the same importance=",
        ),
        (saved("teacher", small_wan(), None), "teacher/fastlightgen.json: names no pruned_path"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            built(config(3, *folders, f"start_model={start}"))
        assert "\n" not in str(error.value)
