"""Models are timed in turn, forwards and backwards, and their medians make the ratio that is shown."""

from types import SimpleNamespace

import pytest

from fastlightgen.config import Evaluate
from fastlightgen.metrics.speed import clocked, counted
from fastlightgen.world import timing


@pytest.fixture
def clock(monkeypatch):
    """Names of the subjects in the order in which they are drawn; their times come from a list each."""
    order: list[tuple[str, int, int]] = []
    times = {"teacher": [4.0, 9.0, 5.0], "student": [99.0, 0.5, 0.1, 0.2]}  # the student's first run warms up

    def draw(cfg, subject, count):
        order.append((subject.name, count, cfg.batch))
        return None, None, times[subject.name].pop(0)

    monkeypatch.setattr(timing, "draw", draw)
    return order


def subject(name: str, evaluations: int, flops: list[int]):
    return SimpleNamespace(name=name, evaluations=evaluations, block_flops=lambda clip: flops)


def test_rows_are_timed_in_turn(clock):
    teacher, student = subject("teacher", 100, [7] * 12), subject("student", 4, [7] * 8)
    cfg = Evaluate(model="tiny", out="unused.json")
    seconds = timing.timed(cfg, [teacher, student])
    names = ["student", "teacher", "student", "student", "teacher", "teacher", "student"]
    assert clock == [(name, 4, 4) for name in names]
    assert seconds == [[4.0, 9.0, 5.0], [0.5, 0.1, 0.2]]
    speed = timing.speedup(cfg, teacher, student, seconds)
    # 100 x 12 / (4 x 8); the medians 5 and 0.2; the turns 4 / 0.5, 9 / 0.1 and 5 / 0.2
    assert speed["theory"] == 37.5 and speed["theory_formula"] == "100 x 12 / (4 x 8)"
    assert speed["measured"] == 25.0 == speed["teacher_seconds"] / speed["student_seconds"]
    assert speed["measured_range"] == [8.0, 90.0] and speed["batch"] == 4
    assert counted(speed) == "37.5x by counting blocks (100 x 12 / (4 x 8))"
    assert clocked(speed) == "25.0x measured (from 8.0x to 90.0x in turns, batch 4)"


@pytest.mark.parametrize("words, batch", [({"clips": 3}, 3), ({"batch": 2}, 2), ({}, 4)])
def test_all_are_timed_with_one_batch(clock, words, batch):
    cfg = Evaluate(model="tiny", out="unused.json", **words)
    assert timing.batch_of(cfg) == batch
    timing.timed(cfg, [subject("teacher", 1, [1]), subject("student", 1, [1])])
    assert {tuple(c[1:]) for c in clock} == {(batch, batch)}
