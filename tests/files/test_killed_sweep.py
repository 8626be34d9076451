"""kill -9 of a sweep: what it started keeps its work to itself, and the same command continues to the same table."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fastlightgen.sweeps import work
from fastlightgen.sweeps.processes import begin

KILLS = int(os.environ.get("FLG_KILLS", "4"))
WORDS = ["steps=2,4", "seeds=2", "iters=4", "clips=16", "model=tiny", "data=shapes", "stage1.clips=2", "batch=2"]
WORDS += ["stage3.critic_start=0", "stage3.iters=5", "threads=1"]


def test_the_work_stays_locked_until_its_process_ends(tmp_path):
    """The sweep is gone, which closes its file; the training that it started still has the lock."""
    name, go = tmp_path / ".part.lock", tmp_path / "go"
    lock = work.taken(name)
    assert lock
    process = begin(wait_for, (str(go),), tmp_path / "log.txt", lock)
    lock.close()
    assert work.taken(name) is None
    go.touch()
    process.join()
    assert process.exitcode == 0 and work.taken(name)


def wait_for(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(36000)
def test_a_killed_sweep_goes_on(tmp_path):
    """Kill it alone, and with all that it started, in turn; what was alone when it died is waited for."""

    def command(run):
        return [sys.executable, "-m", "fastlightgen.sweep", *WORDS, f"run={tmp_path / run}"]

    def files(run):
        return {name: (tmp_path / run / name).read_bytes() for name in ("table.md", "sweep.json")}

    subprocess.run(command("whole"), check=True)
    moments = random.Random(0)
    for kill in range(KILLS):
        process = subprocess.Popen(command("killed"), start_new_session=True)
        try:
            assert process.wait(timeout=moments.uniform(2, 40)) == 0
            break
        except subprocess.TimeoutExpired:
            if kill % 2:
                subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=True)  # its session
            else:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
    subprocess.run(command("killed"), check=True)
    assert files("killed") == files("whole")
