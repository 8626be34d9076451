"""An alarm of rank 0 ends both ranks; the log says how long they waited for each other."""

import importlib.util
import time

import pytest
from helpers import write_inputs
from launch import finish, launch

from fastlightgen.engine.checkpoint import steps
from fastlightgen.engine.log import read_metrics

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.timeout(200)
def test_stop_ends_all_ranks(tmp_path):
    """The clips of a network with random weights flash; they are looked at after step 4."""
    words = ["stage=3", *write_inputs(tmp_path)[3], "engine=deepspeed", f"run={tmp_path}/run", "alarms=stop"]
    began = time.monotonic()
    _, err = finish(launch(2, *words, "iters=50", "save_every=2", "keep=2", "sample_every=4", "log_every=1"), 120)
    assert time.monotonic() - began < 120
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    folder = tmp_path / "run/stage3"
    assert "alarms=stop: step 4: " in line and "flashing: motion of the clips" in line, line
    assert f"the last checkpoint before it is {folder}/checkpoints/step-000002; give alarms=warn" in line
    assert {a["good"] for a in read_metrics(folder / "alarms.jsonl")} == {2}
    assert steps(folder / "checkpoints") == [2, 4] and "exitcode  : 2" in err
    lines = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in lines] == [1, 2, 3, 4]
    for r in lines:
        shares = {k: v for k, v in r.items() if k.startswith("share_")}
        assert shares["share_collectives"] > 0 and all(v > 0 for v in shares.values()) and sum(shares.values()) <= 1
