"""The exported scheduler settings, run as diffusers' pipelines run them, against the student's ladder."""

import numpy as np
import pytest
import torch

from fastlightgen.flow import ladder, rollout
from fastlightgen.models.families import FAMILIES
from fastlightgen.pipelines.scheduler import scheduler_config, stock_boundary


def stock(family: str, steps: int, shift: float, kind: str = "stochastic"):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        scheduler_config(FAMILIES[family], ladder(steps, shift), shift, kind)
    )
    if family == "hunyuan":  # its pipelines pass the sigmas; Wan's pass the number of steps
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    else:
        scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0, 17.0])
@pytest.mark.parametrize("steps", range(1, 9))
def test_sigmas_are_the_ladder(family: str, shift: float, steps: int):
    scheduler = stock(family, steps, shift)
    wanted = [shift * u / (1 + (shift - 1) * u) for u in (1 - i / steps for i in range(steps))]
    # The settings give the ladder exactly, up to float32 rounding (the export allows 2e-3).
    assert np.abs(scheduler.sigmas.numpy() - [*wanted, 0]).max() < 2e-6
    assert np.abs(scheduler.timesteps.numpy() / 1000 - wanted).max() < 2e-6


@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
def test_stock_pipelines_give_each_step_to_our_expert(shift: float):
    """Also if the boundary is a time of the ladder, which the scheduler's rounding may carry to its other side."""
    times, timesteps = ladder(4, shift), stock("wan", 4, shift).timesteps
    for boundary in (0.875, *times[1:], *(t + 1e-9 for t in times[1:])):
        written = stock_boundary(times, boundary)
        assert (timesteps >= written * 1000).tolist() == [t >= boundary for t in times]
        assert written == boundary or min(abs(t - boundary) for t in times) < 2e-3


def test_longest_ladder_and_beyond():
    assert np.abs(stock("wan", 16, 1000.0).sigmas.numpy()[:-1] - ladder(16, 1000.0)).max() < 2e-5
    with pytest.raises(ValueError, match="ladder of 17 steps; the stock scheduler follows at most 16"):
        scheduler_config(FAMILIES["wan"], ladder(17, 5.0), 5.0, "ode")
    with pytest.raises(ValueError, match=r"is not the one of 4 steps and shift 3; .* train the student on that"):
        scheduler_config(FAMILIES["wan"], ladder(4, 5.0), 3.0, "ode")


@pytest.mark.parametrize("kind", ["ode", "stochastic"])
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_steps_are_the_sampler(family: str, kind: str):
    """With the same noise at the start and between steps, the scheduler's loop equals `rollout`."""
    torch.manual_seed(0)
    start, fresh = torch.randn(2, 4, 3, 6, 6), [torch.randn(2, 4, 3, 6, 6) for _ in range(4)]
    times = ladder(4, 5.0)

    def predict(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.tanh(x) * (1 + t)

    scheduler, x = stock(family, 4, 5.0, kind), start
    draws = iter(fresh)
    with pytest.MonkeyPatch.context() as patch:
        module = "diffusers.schedulers.scheduling_flow_match_euler_discrete"
        patch.setattr(f"{module}.randn_tensor", lambda *_, **__: next(draws))
        for t in scheduler.timesteps:
            x = scheduler.step(predict(x, float(t) / 1000), t, x, return_dict=False)[0]
    wanted = rollout(predict, start, times, kind, lambda i: fresh[i])
    # sigmas differ by float32 rounding, below 2e-6, and values are below 5
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
