"""The losses of all stages on a small network equal the recorded ones, so that a refactor cannot change them.

After an intended change `FLG_RECORD=1 pytest tests/stages/test_golden.py` records them anew.
"""

import json
import os
from pathlib import Path

import pytest
from helpers import result, run_train, write_inputs

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
# Relative. One machine always gives the same bits. Another processor's matrix products differ by some 1e-7 per step,
# which the optimizer steps amplify.
TOLERANCE = 1e-4
RUNS = {
    "0": (0, []),
    "2": (2, []),
    "2 alpha 0.5": (2, ["alpha=0.5"]),
    "3": (3, []),
    "3 same": (3, ["guidance_times=same"]),
}


def rank(tmp_path: Path) -> list[dict]:
    words = ["clips=4", "batch=4", "timesteps=2", "threads=1"]
    run_train("stage=1", f"run={tmp_path}/1", f"model={tmp_path}/teacher", *words)
    record = json.loads((tmp_path / "1" / "stage1" / "importance.json").read_text())
    return [{"score": u["score"]} for u in record["units"]] + [{"score": record["baseline_score"]}]


@pytest.mark.parametrize("name", ["1", *RUNS])
def test_losses_are_those_on_record(tmp_path, name):
    words = write_inputs(tmp_path)
    if name == "1":
        got = rank(tmp_path)
    else:
        stage, extra = RUNS[name]
        run_train(f"stage={stage}", f"run={tmp_path}/r", *words[stage], *extra, "log_every=1", "iters=4")
        got = result(tmp_path / "r", stage)["metrics"]
    found = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if os.environ.get("FLG_RECORD"):
        FILE.write_text(json.dumps(found | {name: got}, indent=1) + "\n")
        return
    assert len(got) == len(found[name])
    for new, old in zip(got, found[name]):
        assert new == pytest.approx(old, rel=TOLERANCE)
