"""Starting real ranks for a test: gloo on this CPU, in a group of their own that is ended with the test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import fastlightgen

WORKER = Path(__file__).with_name("worker.py")


def launch(ranks: int, *words: str, module: bool = True) -> subprocess.Popen:
    """torchrun with `ranks` processes: the train command, or the file that `words` begin with."""
    env = os.environ | {
        "PYTHONPATH": str(Path(fastlightgen.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "fastlightgen.train"] if module else []
    return subprocess.Popen(
        [*command, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen, seconds: float) -> tuple[str, str]:
    """Its output; whatever is still running after `seconds` is killed, the ranks included."""
    children = ranks_of(process)
    try:
        return process.communicate(timeout=seconds)
    finally:
        for pid in {process.pid, *children, *ranks_of(process)}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's ranks, in the order of their start."""
    out = []
    for thread in Path(f"/proc/{process.pid}/task").glob("*/children"):
        out += [int(pid) for pid in thread.read_text().split()]
    return sorted(out)
