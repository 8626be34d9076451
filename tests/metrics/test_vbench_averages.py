"""The averages of VBench-I2V: every one that the FastLightGen paper prints, and totals that another report prints."""

import json
from pathlib import Path

import pytest

from fastlightgen.evaluation.vbench import SEVEN, SIX, average, summary

PRINTED = json.loads((Path(__file__).parent / "paper_averages.json").read_text())["rows"]
# The scores are rounded to 0.001, so that their mean is off by up to 0.0005, and some averages seem cut, not rounded.
ROUNDING = 0.00101


def recomputed(row: list) -> float:
    values = row[2:-1]
    dimensions = {6: SIX, 7: SEVEN}[len(values)]
    found = average(dict(zip(dimensions, values, strict=True)), dimensions)
    assert found is not None
    return found


def test_every_printed_average_but_one_is_the_mean_of_its_row():
    """51 in the paper's Tables 1, 2 and 4 to 9. Table 4, alpha = 0.5, prints 0.780; its row gives 0.787."""
    wrong = {
        (row[0], row[1]): round(recomputed(row), 3) for row in PRINTED if abs(recomputed(row) - row[-1]) > ROUNDING
    }
    assert len(PRINTED) == 51 and wrong == {("4", "alpha=0.5"): 0.787}


def test_with_the_mean_of_its_row_the_table_rises_with_alpha():
    rows = [row for row in PRINTED if row[0] == "4" and row[1].startswith("alpha")]
    means = [recomputed(row) for row in rows]
    assert means == sorted(means) and [row[-1] for row in rows] != sorted(row[-1] for row in rows)


# Step-Video-TI2V (arXiv 2503.11251), the table of its VBench-I2V results in percent, four models.
REPORTED = {
    "camera_motion": (48.15, 49.22, 29.58, 46.45),
    "i2v_subject": (97.44, 97.85, 97.73, 95.88),
    "i2v_background": (98.45, 98.63, 98.83, 96.47),
    "subject_consistency": (95.62, 96.02, 94.52, 96.28),
    "background_consistency": (96.92, 97.06, 96.47, 97.38),
    "motion_smoothness": (99.08, 99.24, 98.09, 99.10),
    "dynamic_degree": (48.78, 36.58, 53.41, 38.13),
    "aesthetic_quality": (61.74, 62.29, 61.04, 61.82),
    "imaging_quality": (70.17, 70.43, 71.12, 70.82),
}
TOTALS = {"i2v": (95.11, 95.50, 94.63, 93.25), "quality": (80.86, 80.11, 80.36, 80.28)}
TOTAL = (87.98, 87.80, 87.49, 86.77)


@pytest.mark.parametrize("model", range(4))
def test_the_total_is_that_of_a_published_table(model):
    """The scores have two decimals of a percent; motion smoothness is stretched by 1 / (0.9975 - 0.706) = 3.4.

    The fourth model's printed I2V score is not that of its three printed parts, which give 92.88.
    """
    found = summary({dimension: values[model] / 100 for dimension, values in REPORTED.items()})
    for name, values in (*TOTALS.items(), ("total", TOTAL)):
        if model < 3 or name == "quality":
            assert 100 * found[name] == pytest.approx(values[model], abs=0.02), name
    assert found["average_7"] is None and found["average_6"] is not None


def test_a_missing_dimension_gives_no_total():
    scores = {dimension: values[0] / 100 for dimension, values in REPORTED.items() if dimension != "camera_motion"}
    found = summary(scores)
    assert found["total"] is found["i2v"] is None and 100 * found["quality"] == pytest.approx(80.86, abs=0.02)
