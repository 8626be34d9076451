"""Stage 0: flow matching against a float64 computation, dropped prompts, learning rate and model card."""

import json
import math

import pytest
import torch
from helpers import batches, config, result, run_train, small_wan, write_inputs

from fastlightgen import flow
from fastlightgen.engine.local import LocalEngine
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.teacher import Teacher, flow_matching_loss, noised


def test_loss_and_gradient_of_flow_matching():
    gen = torch.Generator().manual_seed(0)
    v, x0, noise = (torch.randn(2, 3, 4, dtype=torch.float64, generator=gen) for _ in range(3))
    v.requires_grad_(True)
    loss = flow_matching_loss(v, x0, noise)
    loss.backward()
    numbers = zip(*(z.detach().flatten().tolist() for z in (v, noise, x0)), strict=True)
    assert loss.item() == pytest.approx(sum((a - (n - x)) ** 2 for a, n, x in numbers) / 24)
    assert torch.allclose(v.grad, 2 * (v.detach() - noise + x0) / 24, rtol=1e-12)


def test_the_stage_s_loss_is_that_of_its_draws():
    cfg, net, draw = config(0, "text_dropout=0.5", "seed=3"), small_wan(), batches(2)
    stage = Teacher(cfg, net, draw, {})
    batch = draw(5)
    gen = generator(3, 0, 5)  # seed, purpose, step: time, dropped prompts, noise
    t = flow.draw_times(2, 3.0, "uniform", gen)
    dropped = torch.rand(2, generator=gen) < 0.5
    noise = normal_like(batch.x0, gen)
    total = 0.0
    for b in range(2):
        text = (batch.null if dropped[b] else batch.cond).map(lambda v, b=b: v[b : b + 1])
        x_t = (1 - t[b]) * batch.x0[b] + t[b] * noise[b]
        with torch.no_grad():
            v = net(x_t[None], t[b : b + 1], text)[0]
        total += ((v.double() - (noise[b] - batch.x0[b]).double()) ** 2).mean().item() / 2
    assert stage.updates(5)[0].loss()[0].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_prompts_are_dropped_with_their_probability(rate):
    cfg, batch = config(0, f"text_dropout={rate}"), batches(50)(0)
    dropped = []
    for step in range(40):
        cond = noised(batch, cfg, 0, 0, step)[3]
        empty = (cond.text == batch.null.text).flatten(1).all(1)
        assert torch.equal(cond.text[~empty], batch.cond.text[~empty]) and cond.image is batch.cond.image
        dropped.append(empty.float().mean().item())
    # 2000 coins: three standard errors
    assert abs(sum(dropped) / 40 - rate) <= 3 * math.sqrt(rate * (1 - rate) / 2000)


def test_times_are_shifted_uniform():
    cfg, batch = config(0, "shift=3"), batches(50)(0)
    t = torch.cat([noised(batch, cfg, 0, 0, step)[1] for step in range(40)])
    u = t / (3 - 2 * t)
    # The Kolmogorov distance of n uniform draws exceeds 1.63 / sqrt(n) for one seed in a hundred; this seed is fixed.
    distance = (u.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max().item()
    assert distance < 1.63 / math.sqrt(2000)


def test_learning_rate_rises_then_follows_the_cosine():
    cfg = config(0, "iters=8", "warmup=2", "lr=0.1", "text_dropout=0")
    stage, engine = Teacher(cfg, small_wan(), batches(2), {}), LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    rates = [engine.apply(stage.updates(s)[0], s)["lr"] for s in range(4)]
    assert rates == pytest.approx(
        [0.1 * w * (0.5 + 0.5 * math.cos(math.pi * s / 8)) for s, w in enumerate((0.5, 1, 1, 1))]
    )


def test_one_step_is_adamw_on_the_clipped_gradient():
    cfg = config(0, "iters=8", "warmup=0", "lr=0.01", "clip=0.001", "lr_schedule=constant", "betas=[0.5,0.9]")
    net = small_wan()
    stage, engine = Teacher(cfg, net, batches(2), {}), LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    loss, _ = stage.loss(0)
    name = "blocks.1.ffn.net.2.weight"
    before = net.get_parameter(name).detach().double()
    grads = dict(
        zip([n for n, _ in net.named_parameters()], torch.autograd.grad(loss, list(net.parameters())), strict=True)
    )
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    record = engine.apply(stage.updates(0)[0], 0)
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5) and record["loss"] == pytest.approx(loss.item())
    g = grads[name].double() * 0.001 / (norm + 1e-6)
    # Adam's first step is g / (|g| + eps) whatever the betas; the decay is decoupled.
    wanted = before * (1 - 0.01 * 0.01) - 0.01 * g / (g.abs() + 1e-8)
    assert torch.allclose(net.get_parameter(name).double(), wanted, atol=2e-5 * 0.01 + 1e-7)


def test_the_card_and_the_saved_type(tmp_path):
    words = write_inputs(tmp_path)[0]
    run_train("stage=0", f"run={tmp_path}/r", *words, "save_dtype=bfloat16")
    out = result(tmp_path / "r", 0)
    assert out["card"]["stage"] == 0 and out["card"]["shift"] == 3.0 and out["card"]["guidance"] == 2.0
    full = out["state"]["teacher.safetensors"]
    assert all(torch.equal(v, full[k].bfloat16()) for k, v in out["model"].items())
    assert json.loads((tmp_path / "r/stage0/model/config.json").read_text())["num_layers"] == 4
