"""Work in processes of their own that begin at once: they fork from a server that has imported torch and this package.

The server is a process without threads and without a GPU, so that forking it is safe whatever its client did before.
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

from fastlightgen.config import main

PRELOADED = ["fastlightgen.sweeps.apart", "fastlightgen.train", "fastlightgen.evaluate"]


def begin(
    work: Callable[..., object], args: Sequence[Any], log: Path, lock: IO[str] | None = None, **env: str
) -> BaseProcess:
    """Start a process that calls `work(*args)`, prints into `log`, and holds `lock` until it ends.

    If this process is killed, the work goes on and stays locked.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    process = server.Process(target=_within, args=(work, args, log, lock and Held(lock.fileno()), env))
    process.start()
    return process


def run_command(command: str, words: Sequence[str]) -> None:
    """What `python -m fastlightgen.COMMAND WORDS` does."""
    sys.argv = [f"fastlightgen.{command}", *words]
    main(getattr(importlib.import_module(f"fastlightgen.{command}"), command), command)


class Held:
    """An open file that a started process gets too."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Held._arrived, (DupFd(self.number),)

    @staticmethod
    def _arrived(sent: Any) -> "Held":
        return Held(sent.detach())


def _within(work: Callable[..., object], args: Sequence[Any], log: Path, held: Held | None, env: Mapping[str, str]):
    """In the started process, whose end closes what it holds."""
    os.environ.update(env)
    with open(log, "a") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    work(*args)
