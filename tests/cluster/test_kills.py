"""kill -9 of one rank or all ranks at random moments: a run can always be continued, with bit-equal results.

FLG_KILLS=50 FLG_KILL_SEED=1 pytest -m slow -s tests/cluster/test_kills.py: another number of kills, at other moments.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_same, untimed, write_inputs
from launch import ranks_of
from safetensors.torch import load_file

import fastlightgen
from fastlightgen.engine import checkpoint

psutil = pytest.importorskip("psutil")  # comes with deepspeed
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ITERS, SPREAD = 100000, 1.5  # more steps than a run takes before it is killed; span of the kill's time, seconds
LOCAL = [sys.executable, "-m", "fastlightgen.train"]
TWO = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "fastlightgen.train",
]


def start(launcher: list[str], words: list[str], log: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(Path(fastlightgen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env |= {"DS_ACCELERATOR": "cpu"}
    with open(log, "w") as out:
        return subprocess.Popen([*launcher, *words], env=env, stdout=out, stderr=out)


def newest(folder: Path) -> int:
    return (checkpoint.steps(folder) or [0])[-1]


def until(process: subprocess.Popen, folder: Path, step: int, log: Path) -> None:
    """Wait for the checkpoint of `step` or a later one; the test's own limit ends the wait."""
    while newest(folder) < step:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.005)


def kill(process: subprocess.Popen, one: random.Random | None = None) -> None:
    """kill -9 of one random rank, after which torchrun ends the others, or of all processes."""
    ranks = ranks_of(process)
    if one and ranks:
        one.choice(ranks).kill()
        try:
            process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            pass
    process.kill()
    for rank in ranks:  # torchrun's ranks outlive it
        try:
            rank.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    psutil.wait_procs(ranks, timeout=600)


@pytest.mark.parametrize(
    "launcher, stage, extra, count",
    [
        pytest.param(LOCAL, 0, ["ema=0.9"], 4, id="stage 0"),
        pytest.param(LOCAL, 2, ["target=ema", "alpha=0.7"], 3, id="stage 2"),
        pytest.param(LOCAL, 3, ["fake_mode=lora", "lora_rank=2", "ema=0.9"], 3, id="stage 3"),
        pytest.param(TWO, 2, ["zero=3", "target=ema", "alpha=0.7"], 3, id="two ranks, stage 2"),
        pytest.param(TWO, 3, ["zero=2", "ema=0.9"], 2, id="two ranks, stage 3"),
    ],
)
def test_killed_at_random_moments(tmp_path, launcher, stage, extra, count):
    draw = random.Random(int(os.environ.get("FLG_KILL_SEED", 0)))
    count = int(os.environ.get("FLG_KILLS", count))
    if launcher is TWO:
        if importlib.util.find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        extra = [*extra, "engine=deepspeed"]
    fixed = [
        f"stage={stage}",
        f"iters={ITERS}",
        "sample_every=0",
        "log_every=1",
        *(["guard=1e9"] if stage == 2 else []),
    ]
    given = dict(w.split("=", 1) for w in [*write_inputs(tmp_path)[stage], *extra, *fixed])

    def run(name: str, save_every: int) -> tuple[subprocess.Popen, Path, Path]:
        words = given | {"run": str(tmp_path / name), "save_every": str(save_every)}
        log = tmp_path / f"{name}.log"
        process = start(launcher, [f"{k}={v}" for k, v in words.items()], log)
        return process, tmp_path / name / f"stage{stage}/checkpoints", log

    early = writing = 0
    for _ in range(count):
        every = 1 if draw.random() < 0.6 else draw.randint(2, 20)
        process, folder, log = run("killed", every)
        if draw.random() < 0.2:  # while it starts
            time.sleep(draw.uniform(0, 6))
            early += 1
        else:
            until(process, folder, newest(folder) + 1, log)
            time.sleep(draw.uniform(0, SPREAD))
            while every == 1 and not any(folder.glob(".step-*.tmp")):  # kill in the middle of a save
                assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(draw.uniform(0, 0.005))
        writing += any(folder.glob(".step-*.tmp"))
        kill(process, draw if launcher is TWO and draw.random() < 0.5 else None)
        assert not process.returncode == 0, log.read_text()[-3000:]

    # Continue to a step at which the undisturbed run has a checkpoint too.
    last = newest(folder) + 3
    print(f"\n{count} kills, {early} of them while it started, {writing} while a checkpoint was written; {last} steps")
    for name in ("killed", "whole"):
        process, folder, log = run(name, last)
        until(process, folder, last, log)
        kill(process)
    one, two = (tmp_path / name / f"stage{stage}" for name in ("killed", "whole"))
    files = [sorted(p.name for p in (where / f"checkpoints/step-{last:06d}").iterdir()) for where in (one, two)]
    assert files[0] == files[1]
    for name in files[0]:
        a, b = (where / f"checkpoints/step-{last:06d}" / name for where in (one, two))
        if a.suffix == ".safetensors":
            assert_same(load_file(a), load_file(b))
        else:
            assert json.loads(a.read_text()) == json.loads(b.read_text())
    assert_same(lines(one, last), lines(two, last))
    assert [line["step"] for line in lines(one, last)] == list(range(1, last + 1))


def lines(stage: Path, last: int) -> list[dict]:
    """Return the records of metrics.jsonl up to a step, without times; a kill may have cut the last line short."""
    whole = (stage / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in whole if line.endswith("\n")]
    return [untimed(r) for r in records if r["step"] <= last]
