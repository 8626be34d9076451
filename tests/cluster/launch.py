"""Starting real ranks for a test: gloo on this CPU, ended with the test."""

import os
import subprocess
import sys
import time
from pathlib import Path

import fastlightgen

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 900.0  # seconds; a busy machine needs a tenth of it, and a collective would wait for twice as long


def wait_for(file: Path, process: subprocess.Popen) -> None:
    """Until a process has made the file; the test's own limit ends the wait."""
    while not file.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.02)


def launch(ranks: int, *words: str, module: bool = True, **variables: str) -> subprocess.Popen:
    """torchrun with `ranks` processes: the train command, or the file that `words` begin with."""
    env = os.environ | {
        "PYTHONPATH": str(Path(fastlightgen.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "fastlightgen.train"] if module else []
    last = {w.split("=", 1)[0]: w for w in words}  # a later word replaces an earlier one
    return subprocess.Popen(
        [*command, *last.values()], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ranks_of(process: subprocess.Popen) -> list:
    """torchrun's ranks as psutil processes, in the order of their start."""
    import psutil

    try:
        return sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    except psutil.NoSuchProcess:
        return []


def finish(process: subprocess.Popen, seconds: float = PATIENCE) -> tuple[str, str]:
    """Its output; whatever is still running after `seconds` is killed, the ranks included."""
    import psutil

    started = ranks_of(process)
    try:
        return process.communicate(timeout=seconds)
    finally:
        for child in [*started, *ranks_of(process)]:
            try:
                child.kill()  # psutil sees to it that the number has not gone to another process
            except psutil.NoSuchProcess:
                pass
        process.kill()
