"""python kill_encode.py OUT N,N,... KEY=VALUE ...: encode once undisturbed, and once per N, killed at the N-th file.

Every run is a fork of this process, which has one thread; killed runs are then continued. Prints as JSON, for each N:
whether the run was killed, whether an index existed then, and the number of temporary files.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from fastlightgen import encode as command
from fastlightgen.config import load
from fastlightgen.pipelines.encoders import Encoders

replace = os.replace


def forked(out: Path, words: list[str], n: int = 0) -> int:
    """Run the command in a fork that SIGKILL ends at its n-th file: for odd n before the file gets its name."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = []

    def replace_and_die(source, target):
        seen.append(target)
        if len(seen) == n and n % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if len(seen) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die
    code = 1
    try:
        command.encode(load([f"out={out}", *words], "encode"))
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    root, moments, words = Path(sys.argv[1]), json.loads(f"[{sys.argv[2]}]"), sys.argv[3:]
    torch.set_num_threads(1)
    encoders = Encoders(next(w for w in words if w.startswith("pipeline=")).removeprefix("pipeline="))
    command.load_encoders = lambda cfg, rank: encoders
    assert forked(root / "undisturbed", words) == 0
    outcome = {}
    for n in moments:
        status = forked(root / str(n), words, n)
        left = len(list((root / str(n)).rglob("*.tmp")))
        outcome[n] = [os.WIFSIGNALED(status), (root / str(n) / "index.json").exists(), left]
        assert forked(root / str(n), words) == 0
    print(json.dumps(outcome))
