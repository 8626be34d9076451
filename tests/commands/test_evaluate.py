"""The evaluate command on the shipped teacher, which comes with its scores."""

import json
from pathlib import Path

import pytest

from fastlightgen.config import main
from fastlightgen.evaluate import evaluate

SHIPPED = json.loads((Path(__file__).parents[2] / "configs/model/tiny/scores.json").read_text())["records"]


@pytest.mark.parametrize("show", [1, 0])
def test_shipped_scores_stand_where_clips_are_only_shown(tmp_path, show):
    record = SHIPPED[0]
    words = ["model=tiny", f"steps={len(record['plan']['times'])}", f"guidance={record['plan']['guidance']}", "clips=2"]
    words += [f"show={show}", f"out={tmp_path / 'scores.json'}", "threads=1", "progress=false"]
    main(evaluate, "evaluate", words)
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["clips"] == (record["clips"] if show else 2) and ("note" in found) == bool(show)
    assert (found["scores"] == record["scores"]) == bool(show)
