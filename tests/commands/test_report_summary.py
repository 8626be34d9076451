"""The top of the report: what was won, against what, and whether it is beyond noise; the two ratios of speed."""

import json

import pytest
from runs import Page, make_run, record

from fastlightgen.metrics.speed import warning
from fastlightgen.report import write_report

MADE = "The student makes a clip in 50 steps with 2 of 3 blocks, 37.5 times cheaper than its teacher (counted; "


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def verdicts(**words: str) -> dict:
    names = {"b": "better", "w": "worse", "s": "no difference"}
    return {key: {"verdict": names[word]} for key, word in words.items()}


def top(run, **student) -> tuple[str, str]:
    """(the sentence in bold, the rest of the paragraph) of a page whose student's record has these keys."""
    path = run / "evaluate" / "student.json"
    path.write_text(json.dumps(record("student") | student))
    texts = Page(write_report(run)).text.split("|")
    place = next(i for i, text in enumerate(texts) if text.startswith("The student makes"))
    return texts[place], texts[place + 1].strip()


def test_too_few_clips_are_not_ranked(run):
    wanted = "36.1 measured); against the teacher in 50 steps it is not ranked: 32 clips are too few to tell a "
    assert top(run) == (MADE + wanted + "difference from noise.", "")


def test_losses_are_said_as_loudly_as_gains(run):
    both = verdicts(adherence="b", saturation="w", tracking_error="s")
    wanted = "it is better in 1 (adherence 91.2% against 87.4%), worse in 1 (saturation 0.500 against 0.430) and "
    assert top(run, against_teacher=both)[0].endswith(wanted + "not different beyond noise in 1 of 3 scores.")
    lost = verdicts(adherence="w", saturation="w")
    wanted = "it is better in none, worse in 2 (adherence 91.2% against 87.4%, saturation 0.500 against 0.430) and "
    assert top(run, against_teacher=lost)[0].endswith(wanted + "not different beyond noise in none of 2 scores.")


def test_the_teacher_in_as_many_steps_stands_beside_the_student(run):
    """Its cost is 100 evaluations of 3 blocks against 100 of 2; in the table it is the student's neighbour."""
    few = record("teacher") | {"title": "Teacher, few steps"}
    few["scores"] = few["scores"] | {"adherence": 0.8}
    (run / "evaluate" / "teacher-few.json").write_text(json.dumps(few))
    more = {"against_teacher": verdicts(adherence="s"), "against": {"teacher-few": verdicts(adherence="b")}}
    _, rest = top(run, **more)
    assert rest == (
        "Against the teacher in 50 steps, which cost 1.5 times as much, it is better in 1 (adherence 91.2% against "
        "80.0%), worse in none and not different beyond noise in none of 1 score."
    )
    page = Page(run / "report.html")
    cells = [a["data-label"] for tag, a in page.tags if tag == "td"]
    assert cells[:4] == ["Real", "Teacher", "Teacher, few steps", "Student"]
    assert "Cost|block evaluations per clip|–|300|300|200|" in page.text


def test_measured_and_counted_ratios_stand_together(run):
    page = Page(write_report(run)).text
    assert (
        "|37.5×|cheaper than the teacher|counted in block evaluations: 50 x 2 / (4 x 8/12); 36.1× measured (batch 8)|"
        in page
    )
    assert "37.5× counted (50 x 2 / (4 x 8/12)), 36.1× measured (0.9 s → 0.025 s per clip, batch 8)" in page
    assert "more than 20% away" not in page


def test_ratios_that_differ_by_a_fifth_raise_a_warning(run):
    path = run / "evaluate" / "speed.json"
    speed = json.loads(path.read_text()) | {"measured": 192.6, "measured_range": [150.04, 230.0]}
    path.write_text(json.dumps(speed))
    page = Page(write_report(run)).text
    assert "192.6× measured (from 150.0× to 230.0× in turns, batch 8)" in page
    said = "The measured 192.6x is more than 20% away from the counted 37.5x: the machine was busy"
    assert page.count(said) == 2  # under the headline and under the table
    for measured, warns in ((45.0, False), (45.1, True), (30.0, False), (29.9, True)):
        assert bool(warning(speed | {"measured": measured})) == warns


def test_a_student_that_was_evaluated_alone_brings_its_teacher_and_speed(run):
    for name in ("teacher", "real", "speed"):
        (run / "evaluate" / f"{name}.json").rename(run / f"{name}.json")
    both = {name: json.loads((run / f"{name}.json").read_text()) for name in ("teacher", "speed")}
    assert top(run, **both)[0].startswith(MADE + "36.1 measured); against the teacher in 50 steps")


def test_adherence_is_explained_where_it_first_stands(run):
    page = Page(write_report(run)).text
    assert "adherence of the student|share of the caption's statements that the clip fulfils; in 100 network" in page
