"""Sampling for an evaluation: the progress bar counts the sampling steps of clips, not batches."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from helpers import small_wan

from fastlightgen.config import Evaluate
from fastlightgen.world import subject
from fastlightgen.world.subject import Subject, draw


def test_the_bar_counts_steps_of_clips(monkeypatch):
    bars, updates = [], []

    def bar(total, title, shown, **keys):
        bars.append((total, title, shown, keys))
        return nullcontext(SimpleNamespace(update=updates.append))

    monkeypatch.setattr(subject, "bar", bar)
    plan = {"times": [1.0, 0.5], "guidance": 1.0, "kind": "ode"}
    cfg = Evaluate(model="tiny", out="e.json", batch=2, progress=False)
    clips, _, _ = draw(cfg, Subject("a", "Student", small_wan(), Path(), plan), 3)
    assert len(clips) == 3 and bars == [(6, "sampling Student", False, {"unit": "step"})]
    assert updates == [2, 2, 1, 1]  # both steps of two clips, then of one
