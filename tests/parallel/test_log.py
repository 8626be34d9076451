"""Output on screen: sizes by hand, and bars with and without a terminal."""

import re

import pytest

from fastlightgen.parallel.log import bar, count, meanwhile, size


def test_sizes_by_hand():
    assert [size(n) for n in (0, 412, 560_640, 1.5e6, 61_234_567_890, 2e12)] == [
        "0 bytes",
        "412 bytes",
        "561 kB",
        "1.5 MB",
        "61.2 GB",
        "2 TB",
    ]
    assert [count(n) for n in (12, 35_040, 1_304_000, 14_288_491_776)] == ["12", "35K", "1.3M", "14.3B"]
    assert size(999_400) == "999 kB" and size(999_600) == "1 MB"  # never "1e+03 kB"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in place of tqdm's."""
    now = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def work(clock, steps: int, seconds: float, **keys) -> None:
    with bar(steps, "stage 3", True, **keys) as progress:
        for _ in range(steps):
            clock[0] += seconds
            progress.set_postfix({"loss": "0.5"}, refresh=False)
            progress.update()


def test_without_a_terminal_a_bar_prints_whole_lines(clock, capsys):
    """100 steps of 1 s: a line every 10 s, the last one at the end, and nothing that a log cannot show."""
    work(clock, 100, 1.0)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and "█" not in text and all(lines)
    assert [int(re.search(r"(\d+)/100", line)[1]) for line in lines] == [*range(10, 101, 10)]
    assert lines[0].startswith("stage 3:  10% 10/100 [00:10<01:30") and "loss=0.5" in lines[0]


def test_a_long_run_fills_no_log(clock, capsys):
    """Ten hours in steps of 2 s: after 10 minutes a line comes when a 60th of the time so far has passed."""
    work(clock, 18_000, 2.0)
    # 60 lines in the first 600 s, then 60 ln(36000 s / 600 s) = 246; intervals are whole steps, so some are missing
    assert 200 < capsys.readouterr().err.count("\n") < 60 + 246


def test_short_work_is_one_line(clock, capsys):
    work(clock, 4, 0.1)
    assert capsys.readouterr().err.count("\n") == 1


def test_other_work_is_named(clock, capsys):
    with bar(2, "stage 3", True) as progress:
        progress.update(2)
        with meanwhile(progress, "stage 3", "making clips"):
            assert "stage 3, making clips: 100% 2/2" in capsys.readouterr().err
        progress.refresh()
        assert capsys.readouterr().err.startswith("stage 3: 100%")


def test_a_hidden_bar_prints_nothing(capsys):
    with bar(2, "stage 3", False) as progress, meanwhile(progress, "stage 3", "making clips"):
        progress.update(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bar(5_000_000, "copying", True, unit="B", scale=True) as progress:
        progress.update(2_500_000)
    text = capsys.readouterr().err
    assert "\r" in text and "2.50M/5.00M" in text
