"""The papers' tables on the built-in world: their rows, what they share, the sentences, the pictures."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from fastlightgen import sweep
from fastlightgen.config import ConfigError, presets
from fastlightgen.metrics.intervals import Resampled
from fastlightgen.page import figure, frontier
from fastlightgen.sweeps import papers, table
from fastlightgen.sweeps.points import unique

AVERAGES = Path(__file__).parents[1] / "metrics" / "paper_averages.json"
NAMES = presets("papers")


def points(name, tmp_path, seeds=(0,), known=None, **more):
    return papers.points_of(tmp_path, papers.read(name), more, seeds, 64, {} if known is None else known)


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_trends_of_a_file(tmp_path, name):
    """Every key is one that a stage takes, and every trend is what the paper's own numbers say."""
    paper = papers.read(name)
    assert len(points(name, tmp_path)) == len(paper.rows)
    less_is_better = "FVD" in paper.score
    for trend in paper.trends:
        one, other = (paper.rows[row].get("paper") for row in (trend.one, trend.other))
        if None not in (one, other) and trend.kind == "better":
            assert (one < other) == less_is_better and one != other
        if trend.kind == "same" and one is not None:
            assert abs(one - other) < 0.005


@pytest.mark.parametrize("number", ["2", "4", "5", "6", "7", "8", "9"])
def test_papers_numbers(number):
    """A table has every average that the paper prints, in its order; Tables 5 and 8 print their chosen row twice."""
    printed = {tuple(scores): None for table, _, *scores in json.loads(AVERAGES.read_text())["rows"] if table == number}
    ours = [row["paper"] for row in papers.read(f"table-{number}").rows.values() if "paper" in row]
    wanted = [average for *_, average in printed]
    assert (sorted(ours) == sorted(wanted)) if number in "58" else ours == wanted


def test_tables_share_what_is_equal(tmp_path):
    known: dict = {}
    found = {name: points(name, tmp_path, known=known) for name in ("table-2", "figure-2", "table-5", "table-8")}
    assert [p.scores for p in found["table-2"]] == [p.scores for p in found["figure-2"]]
    five, eight = ({p.scores for p in found[name]} for name in ("table-5", "table-8"))
    assert len(five) == len(eight) == 8 and len(five & eight) == 4  # beta1 = 2 with beta2 = 0, .25, .5 and 1
    stages = [part.stage for part in unique(found["table-5"] + found["table-8"])]
    assert [stages.count(n) for n in "123"] == [1, 1, 12]


def test_keys_of_the_user_and_seeds(tmp_path):
    found = points("table-6", tmp_path, seeds=(3, 4), **{"stage2.iters": "7"})
    assert len(found) == 12 and {p.parts[-1].cfg.seed for p in found} == {3, 4}
    assert all(part.cfg.iters == 7 for p in found for part in p.parts if part.stage == "2")
    found = points("table-2", tmp_path, iters="50")  # also over those that the file gives to a stage
    assert {part.cfg.iters for p in found for part in p.parts if part.stage != "1"} == {50}
    found = points("table-6", tmp_path, ratio="2")  # of Stage III: the shares of Stage I stay
    assert {p.parts[0].cfg.ratio for p in found} == {0.3, 0.5, 0.7}
    assert {p.parts[-1].cfg.ratio for p in found if len(p.parts) == 3} == {2}
    found = {p.name: p for p in points("table-vdmini-2", tmp_path, method="dmd2")}
    assert type(found["LCM, 8 steps"].parts[-1].cfg) is type(found["DMD2, 1 step"].parts[-1].cfg)
    teacher, *_ = points("table-4", tmp_path, seeds=(3, 4))
    assert not teacher.parts and teacher.model == "tiny" and teacher.scores.name == "tiny-clips=64-steps=28.json"
    assert sum(p.name == teacher.name for p in points("table-4", tmp_path, seeds=(3, 4))) == 1


@pytest.mark.parametrize("words, said", [
    (["table=4", "data=cache"], "data=cache: a table of the paper is made on the built-in world"),
    (["table=3"], "table=3: no such table or figure; there are figure-1, figure-2, table-2"),
    (["table=2", "stage2.iters=1,2"], "stage2.iters=1,2: a table of the paper takes one value of a key"),
])  # fmt: skip
def test_mistakes(words, said):
    with pytest.raises(ConfigError, match=said):
        sweep.sweep(words)


@pytest.mark.parametrize("difference, word, kind, said", [
    (-5.0, "better", "better", "Holds"),
    (5.0, "worse", "better", "Contradicted"),
    (-1.0, "no difference", "better", "Within noise, the same sign"),
    (1.0, "no difference", "better", "Within noise, the other sign"),
    (0.0, "no difference", "better", "No difference, the same numbers"),
    (1.0, "no difference", "same", "Not contradicted"),
    (-5.0, "better", "same", "Contradicted, the first is better"),
    (5.0, "worse", "same", "Contradicted, the first is worse"),
    (-5.0, "better", "asked", "The first is better"),
    (1.0, "no difference", "asked", "No difference"),
])  # fmt: skip
def test_verdicts(difference, word, kind, said):
    trend = papers.Trend("a", "b", kind)
    assert papers.verdict({"difference": difference, "verdict": word}, trend) == said


def test_a_claim_that_no_paper_makes_is_ours():
    paper = papers.read("table-vdmini-3")
    said = [papers.claimed(trend, paper) for trend in paper.trends]
    assert said[0] == "the paper has by generation better than magnitude, L2 (198.13 and 271.55)"
    assert said[2] == "the paper does not compare x0 error (Eq. 4) with magnitude, L2"


def constant(values, seed):
    """In place of the scores that need a reference of real clips: the mean of each value, without spread."""
    return {k: Resampled(v.mean().item(), v.mean() + torch.zeros(200).double(), 64, 0) for k, v in values.items()}


def write_scores(point, frechet, clips):
    """The files of an evaluation with this distance."""
    point.scores.parent.mkdir(exist_ok=True)
    values = {"frechet": torch.full((clips,), frechet), "adherence": torch.full((clips,), 0.9)}
    save_file(values, point.scores.with_suffix(".values.safetensors"))
    sampler = {"kind": "ode", "steps": 4, "guidance": 1.0, "evaluations": 4}
    scores = {"frechet": frechet, "adherence": 0.9}
    record = {"title": "x", "clips": clips, "scores": scores, "shown": [], "attributes": {}, "sampler": sampler}
    point.scores.write_text(json.dumps(record | {"num_params": 1, "num_blocks": 8, "kept_blocks": None}))


@pytest.mark.parametrize("name", ["table-5", "figure-1"])
def test_few_clips_give_scores_and_no_verdict(tmp_path, monkeypatch, name):
    monkeypatch.setattr(table, "resampled", lambda values, seed: {})
    monkeypatch.setattr(table, "reference", lambda seed: SimpleNamespace(look={"persistence": 0.7}))
    found = points(name, tmp_path)
    for point in found:
        write_scores(point, 20.0, 8)
    text = papers.report(papers.read(name), found, tmp_path)
    assert text.count("| 0.9 | 20 |") == len(papers.read(name).rows)
    picture, shown = (tmp_path / f"{name}.svg").is_file(), f"({name}.svg)" in (tmp_path / f"{name}.md").read_text()
    assert picture == shown == (name == "figure-1")
    trends = [line for line in text.splitlines() if line.startswith("- ")]
    assert all("Not ranked" in line and "8 clips rank no models; 64 or more do" in line for line in trends)
    text = table.table(found, tmp_path)
    assert "| 0.9 | 20 |" in text and text.endswith("8 clips rank no models; 64 or more do (clips=N).")


def test_the_report(tmp_path, monkeypatch):
    """Two rows with known scores: the table, the sentence, the record."""
    monkeypatch.setattr(table, "resampled", constant)
    monkeypatch.setattr(table, "reference", lambda seed: SimpleNamespace(look={"persistence": 0.7}))
    paper = papers.read("table-9")
    found = points("table-9", tmp_path, seeds=(0, 1))
    for point, value in zip(found, (20.0, 22.0, 30.0, 36.0), strict=True):
        write_scores(point, value, 64)
    text = papers.report(paper, found, tmp_path)
    # Variances by hand: of 20 and 22 2, of their mean 1; of 30 and 36 18 and 9; of the differences -10, -14 8 and 4
    assert "| pruned | 0.829 | 32 | 2 | 0.9 +- 0 | 21 +- 2 |" in text
    assert "| unpruned | 0.809 | 32 | 2 | 0.9 +- 0 | 33 +- 6 |" in text
    claim = "the paper has pruned better than unpruned (0.829 and 0.809)"
    assert f"- Holds: {claim}; here frechet -12 +- 4, adherence no difference." in text
    pruned = json.loads((tmp_path / "table-9.json").read_text())["rows"]["pruned"]
    assert pruned["scores"]["frechet"] == [20.0, 22.0] and pruned["two_deviations"]["frechet"] == 2.0
    assert (tmp_path / "table-9.md").read_text() == text + "\n" and "below 0, the first is nearer" in text
    assert [table.short(x) for x in (0.123, 13.17, 99.4, 99.6, 131.7)] == ["0.12", "13", "99", "100", "132"]


def test_pictures():
    """They are XML; a line of equal speed passes where 50 guided steps cost as much as they should."""
    cells = {(step, share): 10.0 * step * share for step in (1, 2, 4) for share in (0.5, 1.0)}
    root = ElementTree.fromstring(figure.grid("a < b", "distance", cells))
    assert [e.text for e in root.iter() if e.get("class") == "cell"] == ["5", "10", "10", "20", "20", "40"]
    speeds = [e.text for e in root.iter() if e.text and e.text.endswith("x")]
    assert speeds == ["33.3x", "50x", "83.3x", "167x"]
    assert not [e for e in root.iter() if e.get("class") == "pair"]
    root = ElementTree.fromstring(figure.grid("t", "distance", cells, [((1, 1.0), (2, 0.5))]))
    [line] = [e.get("d") for e in root.iter() if e.get("class") == "pair"]
    one, other = ([float(x) for x in end.split()] for end in line[1:].split("L"))
    assert one[0] < other[0] and one[1] < other[1]  # from the upper left cell to the middle of the lower row
    assert figure.place(3, [1, 2, 4]) == pytest.approx((1.5 + 0.5) / 3)
    root = ElementTree.fromstring(
        frontier.against_cost("t", "distance", {"a": (10, 2.0, 1.8, 2.0), "b": (1000, 1.0, 1.0, 1.0)})
    )
    a, b = (e for e in root.iter() if e.get("class") == "dot")
    left, right = frontier.FRAME.left, frontier.FRAME.width - frontier.FRAME.right
    assert float(a.get("cx")) == left and float(b.get("cx")) == right
    assert float(a.get("cy")) == pytest.approx(frontier.up(1)) and float(b.get("cy")) == pytest.approx(frontier.up(0))
    line = next(e.get("d") for e in root.iter() if e.get("d", "").startswith(f"M{left:.1f} "))
    low = frontier.up(math.log2(1.8))  # the axis goes from 1 to 2
    assert line == f"M{left:.1f} {low:.1f}V{frontier.up(1):.1f}"


def test_labels_do_not_overlap():
    """Four models of one cost and nearly one score: their names stand a line apart, in the order of the scores."""
    points = {name: (32, value, value, value) for name, value in {"a": 50.0, "b": 49.0, "c": 51.0, "d": 90.0}.items()}
    root = ElementTree.fromstring(frontier.against_cost("t", "distance", points))
    assert frontier.ticks([24.0, 366.0]) == [20, 50, 100, 200, 500] and frontier.ticks([2.0]) == [2, 5]
    heights = {e.text: float(e.get("y")) for e in root.iter() if e.text in points}
    assert heights["b"] - heights["a"] == pytest.approx(frontier.LINE) == heights["a"] - heights["c"]
    assert heights["d"] < heights["c"] - 5 * frontier.LINE
