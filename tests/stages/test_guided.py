"""Stage III against Eq. 8 and 9 written out sample by sample in float64."""

import copy

import pytest
import torch
from by_hand import DOUBLE, exit_rung, make, merged, roll, source, times
from helpers import KEPT

from fastlightgen import flow
from fastlightgen.ops import dmd_gradient
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages import guided
from fastlightgen.stages.distill import dmd_loss

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


def test_betas_and_times_stay_inside_their_ranges_per_sample(folders, monkeypatch):
    words = ["beta1=2", "a1=1", "b1=0.5", "beta2=0.3", "a2=0.1", "b2=0.2"]
    stage, seen = make(folders, "guidance_times=same", "batch=8", *words), []
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
