"""Stage III of the low-noise expert on two real ranks under ZeRO-3 against one process: the partner is sharded too."""

import importlib.util

import pytest
import worker
from helpers import KEPT, small_wan
from launch import on_ranks

from fastlightgen.flow import ladder
from fastlightgen.models.folder.weights import save_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def test_losses_are_those_of_one_process(tmp_path):
    """Sums in float32 differ in their order. The engine promises 1e-5 for losses, gradient norms, learning rates."""
    of = {"boundary": 0.875, "sampler": "stochastic", "ladder": ladder(4, 3.0), "shift": 3.0}
    teacher = save_model(small_wan(seed=1), tmp_path / "teacher", pruned_path=KEPT, expert="low", boundary=0.875)
    partner = save_model(small_wan(seed=2).prune(KEPT), tmp_path / "partner", expert="high", **of)
    words = [f"model={teacher}", f"stage2_model={teacher}", f"partner={partner}", "expert=low", "boundary=0.875"]
    words += ["ratio=2", "critic_start=0", "lr_fake=1e-3", "steps=4"]
    case = {"stage": 3, "steps": 3, "method": "fastlightgen", "words": words}
    one, two = worker.run(case)["records"], on_ranks(2, {"low": case}, tmp_path)["low"]["records"]
    assert len(one) == len(two) >= 3
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-7)
