"""Long runs on the built-in world with a very small network: memory, files, threads and time per step stay flat.

FLG_STEPS=N pytest -m slow -s tests/engine/test_long.py: N steps of each stage (2000). A step of Stage I is a walk.
FLG_LONG_OUT=FILE keeps the numbers; bench/results/long-runs.json holds those of one run.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import measured_with, write_inputs

import fastlightgen
from fastlightgen.atomic import write_json
from fastlightgen.engine.log import read_metrics
from fastlightgen.files.border import read_json

psutil = pytest.importorskip("psutil")  # comes with deepspeed
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
STEPS = int(os.environ.get("FLG_STEPS", "2000"))
PART = max(1, STEPS // 10)  # steps whose time is compared, at both ends
POLL = 0.2  # seconds
MEGABYTE = 1e6


def words_of(stage: int, inputs: dict[int, list[str]], run: Path) -> list[str]:
    """The command of a stage; Stage I counts one walk for each clip and time."""
    own = inputs[0 if stage == 1 else stage]
    if stage == 1:
        left = ("iters", "save_every", "log_every", "init")
        own = [w for w in own if w.partition("=")[0] not in left] + [f"clips={max(STEPS, 2000)}", "timesteps=2"]
    else:
        own = [w for w in own if w.partition("=")[0] not in ("iters", "save_every", "log_every")]
        own += [f"iters={STEPS}", f"save_every={max(1, STEPS // 8)}", "log_every=1", f"sample_every={STEPS // 4}"]
    return [f"stage={stage}", f"run={run}", *own]


def watched(process, run: Path, stage: int) -> list[tuple[float, float, int, int, int]]:
    """(step, CPU seconds, bytes, open files, threads), several times per second; the log is read each time."""
    rows, about = [], psutil.Process(process.pid)
    log = run / f"stage{stage}" / "metrics.jsonl"
    while process.poll() is None:
        try:
            with about.oneshot():
                used = about.cpu_times()
                row = used.user + used.system, about.memory_info().rss, about.num_fds(), about.num_threads()
        except psutil.Error:  # it has just ended
            break
        if not row[1]:  # it has ended, and nobody has asked how
            continue
        lines = read_metrics(log) if log.is_file() else []  # raises if a line is damaged
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        rows.append((float(len(lines)) if stage != 1 else row[0], *row))
        time.sleep(POLL)
    return rows


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """How much y grows from the first to the last x, by a line through all of them."""
    return float(np.polyfit(x - x[0], y, 1)[0] * (x[-1] - x[0]))


def kept(stage: int, numbers: dict[str, object]) -> None:
    """With FLG_LONG_OUT=FILE, write the numbers of a stage into it, beside those of the other stages."""
    if not (file := os.environ.get("FLG_LONG_OUT")):
        return
    words = f"FLG_STEPS={STEPS} FLG_LONG_OUT=FILE pytest -m slow tests/engine/test_long.py"
    before = read_json(Path(file))["stages"] if Path(file).is_file() else {}
    stages = before | {str(stage): numbers | {"steps": STEPS, "measured with": measured_with()}}
    write_json(Path(file), {"command": words, "stages": dict(sorted(stages.items()))})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nothing_grows(tmp_path, stage):
    inputs, run = write_inputs(tmp_path / "inputs"), tmp_path / "run"
    env = os.environ | {"PYTHONPATH": str(Path(fastlightgen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastlightgen.train", *words_of(stage, inputs, run)]
    with open(tmp_path / "out.txt", "w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    rows = np.array(watched(process, run, stage))
    assert process.wait() == 0, (tmp_path / "out.txt").read_text()[-2_000:]
    rows = rows[rows[:, 0] > 0]
    share = rows[:, 0] / rows[-1, 0]
    late = rows[(share > 0.5) & (share < 0.9)]  # after caches are full and clips were made, before the result is drawn
    step, cpu, memory, files, threads = late.T
    grown = slope(step, memory)
    print(f"\nstage {stage}, from 50% to 90%: {memory[0] / 1e6:.1f} to {memory[-1] / 1e6:.1f} MB of memory,")
    print(f"  growth by a line {grown / 1e6:+.2f} MB; {files.min():.0f} to {files.max():.0f} open files,", end=" ")
    print(f"{threads.min():.0f} to {threads.max():.0f} threads")
    numbers: dict[str, object] = {
        "memory_mb": round(float(memory[-1]) / 1e6, 1),
        "memory_mb_per_1000_steps": round(grown / MEGABYTE / (0.4 * STEPS) * 1000, 3),
        "open_files": [int(files.min()), int(files.max())],
        "threads": [int(threads.min()), int(threads.max())],
    }
    assert grown < 8 * MEGABYTE
    half = len(late) // 2
    for counted in (files, threads):  # a save opens some for a moment; one that stays open would raise the least
        assert counted[half:].min() <= counted[:half].min()
    if stage != 1:
        first, last = (
            np.interp(b, rows[:, 0], rows[:, 1]) - np.interp(a, rows[:, 0], rows[:, 1])
            for a, b in ((PART, 2 * PART), (STEPS - 2 * PART, STEPS - PART))
        )
        print(f"  CPU time of the last {PART} steps / of the first: {last / first:.2f}")
        numbers["time_of_the_last_steps_to_the_first"] = round(float(last / first), 3)
        assert last / first < 1.5  # a poll is a few steps wide, and a checkpoint may fall into one of the two
    kept(stage, numbers)
