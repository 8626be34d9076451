"""An alarm of rank 0 ends both ranks; the log contains the time that they waited for each other."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from helpers import plain, run_train, write_inputs
from launch import finish, launch
from PIL import Image, ImageSequence

from fastlightgen.engine.checkpoint import steps
from fastlightgen.engine.log import read_metrics

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def assert_clips_of_one_process(shared: Path, run: Path, words: list[str]) -> None:
    """Ranks that divide the clips among them make the same pictures as one process."""
    run_train(*words, f"run={run}", "iters=4", "save_every=9", "sample_every=4")
    folders = [shared, run / "stage3"]
    (ours,), (theirs,) = (read_metrics(f / "samples.jsonl") for f in folders)
    assert ours == pytest.approx(theirs, rel=0.01)
    pictures = []
    for folder in folders:
        with Image.open(folder / "samples/step-000004.gif") as file:
            pictures.append(np.stack([frame.convert("RGB") for frame in ImageSequence.Iterator(file)]).astype(float))
    assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).mean() < 0.1
    columns = np.split(pictures[0], 4, axis=2)  # the clips are side by side; each differs from the others
    assert min(np.abs(a - b).mean() for i, a in enumerate(columns) for b in columns[:i]) > 0.5


def test_stop_ends_all_ranks(tmp_path):
    """The clips of a network with random weights flash, which raises an alarm at the first clips, after step 4."""
    words = ["stage=3", *write_inputs(tmp_path)[3], "engine=deepspeed", f"run={tmp_path}/run", "alarms=stop"]
    _, err = finish(launch(2, *words, "iters=50", "save_every=2", "keep=2", "sample_every=4", "log_every=1"))
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    folder = tmp_path / "run/stage3"
    assert "alarms=stop: step 4: " in line and "flashing: motion of the clips" in line, line
    assert f"the last checkpoint before it is {folder}/checkpoints/step-000002; give alarms=warn" in line
    assert {a["good"] for a in read_metrics(folder / "alarms.jsonl")} == {2}
    assert steps(folder / "checkpoints") == [2, 4] and "exitcode  : 2" in err
    assert_clips_of_one_process(folder, tmp_path / "alone", words[:-3])
    lines = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in lines] == [1, 2, 3, 4]
    for r in lines:
        shares = {k: v for k, v in r.items() if k.startswith("share_")}
        assert shares["share_collectives"] > 0 and all(v > 0 for v in shares.values()) and sum(shares.values()) <= 1


# The train command. The critic diverges from step 6 on; rank 1 writes the checkpoint of step 5 only after the alarm.
SLOW_DISK = """
import os, time
from functools import partial
from pathlib import Path
from fastlightgen.config import main
from fastlightgen.engine import checkpoint, watch
from fastlightgen.metrics import drift
from fastlightgen.stages.distill import Distill
from fastlightgen.train import train
SHOWN = Path(os.environ["FLG_TEST"], "shown")
drift.Limits = partial(drift.Limits, first=3, recent=2, contrast_high=10.0)
critic_loss, write, say = Distill.critic_loss, checkpoint.write, watch.say
def growing(self, step):
    loss, record = critic_loss(self, step)
    return loss * (32.0 if step >= 5 else 1.0), record
def slow(temporary, files):
    end = time.monotonic() + 60
    while os.environ["RANK"] == "1" and "step-000005" in temporary.name and not SHOWN.exists():
        assert time.monotonic() < end, "no alarm"
        time.sleep(0.02)
    write(temporary, files)
def show(text):
    say(text)
    if text.startswith("alarm: ") and os.environ["RANK"] == "0":
        SHOWN.touch()
Distill.critic_loss, checkpoint.write, watch.say = growing, slow, show
main(train, "train")
"""


def test_the_checkpoint_under_way_is_completed_and_named(tmp_path):
    (tmp_path / "train.py").write_text(SLOW_DISK)
    words = ["stage=3", *write_inputs(tmp_path)[3], "engine=deepspeed", f"run={tmp_path}/run", "alarms=stop"]
    words += ["iters=12", "log_every=1", "save_every=1", "keep=1", "sample_every=0"]
    _, err = finish(
        launch(
            2,
            str(tmp_path / "train.py"),
            *(f"{k}={v}" for k, v in plain(words).items()),
            module=False,
            FLG_TEST=str(tmp_path),
        )
    )
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    folder = tmp_path / "run/stage3"
    assert "alarms=stop: step 6: divergence" in line
    assert f"the last checkpoint before it is {folder}/checkpoints/step-000005; give alarms=warn" in line
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-000005"]
    assert {a["good"] for a in read_metrics(folder / "alarms.jsonl")} == {5}
    assert len(list((folder / "checkpoints/step-000005").glob("rank-*.safetensors"))) == 2
