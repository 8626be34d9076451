"""Sampling: against a loop by hand, the number of predictions, and settings from a model folder's card."""

import pytest
import torch

from fastlightgen.flow import ladder
from fastlightgen.models.folder.weights import build
from fastlightgen.models.sample import sample, sampling_plan
from fastlightgen.models.wan.layers import WanConfig
from fastlightgen.rng import generator

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 20, "freq_dim": 32, "ffn_dim": 40}
CONFIG |= {"num_layers": 3}
TIMES = ladder(4, 5.0)


@pytest.fixture(scope="module")
def case():
    model = build(CONFIG, seed=1)
    noise, _, cond, null = model.example_inputs(batch=2, size=(1, 4, 4))
    return model, noise, cond, null


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["ode", "stochastic"])
@torch.no_grad()
def test_is_the_loop_by_hand(case, kind: str, guidance: float):
    model, noise, cond, null = case
    keep, x = [0, 2], noise
    for i, (t, after) in enumerate(zip(TIMES, [*TIMES[1:], 0.0])):
        v_cond, v_null = model(x, t, cond, keep), model(x, t, null, keep)
        v = v_null + guidance * (v_cond - v_null)
        fresh = torch.randn(noise.shape, generator=generator(7, i))
        x = x + (after - t) * v if kind == "ode" else (1 - after) * (x - t * v) + after * fresh
    got = sample(model, cond, null, noise, TIMES, guidance, kind, seed=7, keep=keep)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)  # float32; Euler's last step rounds in another order


def test_guidance_1_takes_one_prediction_per_step(case):
    model, noise, cond, null = case
    for guidance, calls in ((1.0, 4 * 3), (3.0, 2 * 4 * 3)):
        model.block_calls = 0
        out = sample(model, cond, null if guidance > 1 else None, noise, TIMES, guidance, "ode")
        assert model.block_calls == calls and not out.requires_grad


def test_ticks_come_after_the_steps(case):
    """A progress bar stands at 100% when the last step is done, not when it begins."""
    model, noise, cond, null = case
    for guidance, per_step in ((1.0, 3), (3.0, 6)):
        model.block_calls, seen = 0, []
        sample(model, cond, null, noise, TIMES, guidance, "ode", tick=lambda: seen.append(model.block_calls))  # noqa: B023
        assert seen == [per_step * (i + 1) for i in range(len(TIMES))]


def test_the_seed_decides_the_fresh_noise(case):
    model, noise, cond, _ = case
    a, b, c = (sample(model, cond, None, noise, TIMES, 1.0, "stochastic", seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


STUDENT = {"ladder": [1.0, 0.75], "shift": 3.0, "guidance": 1.0, "steps": 2, "sampler": "stochastic"}
TEACHER = {"ladder": None, "shift": 3.0, "guidance": 2.0, "steps": 28}


@pytest.mark.parametrize(
    ("card", "asked", "times", "guidance", "kind"),
    [
        (STUDENT, (0, -1.0, "auto"), [1.0, 0.75], 1.0, "stochastic"),
        (STUDENT, (3, 1.5, "ode"), ladder(3, 3.0), 1.5, "ode"),
        (TEACHER, (0, -1.0, "auto"), ladder(28, 3.0), 2.0, "ode"),
        (TEACHER, (4, 0.0, "auto"), ladder(4, 3.0), 0.0, "ode"),
        ({}, (0, -1.0, "auto"), ladder(50, 5.0), 5.0, "ode"),  # a stock Wan folder
    ],
)
def test_plan(card: dict, asked: tuple, times: list[float], guidance: float, kind: str):
    plan = sampling_plan(card, *asked, WanConfig().released, force=True)
    assert plan == {"times": times, "guidance": guidance, "kind": kind}
    if asked == (0, -1.0, "auto") or card is not STUDENT:  # what the model was made for, or no student
        assert sampling_plan(card, *asked, WanConfig().released) == plan
