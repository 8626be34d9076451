"""Ends a command with SIGKILL just before its n-th change of a file, and runs it again.

Each run is a fork of this process, so it starts without the seconds that importing torch takes. `count` tells how many
changes an undisturbed run makes.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR
# The commands that write; conftest.py has the fixture `case` of each.
CASES = ("stage0", "stage1", "stage2", "stage3", "encode", "export", "generate", "evaluate", "report")

_seen, _limit, _root = 0, 0, ""


def _watch(event: str, args: tuple) -> None:
    global _seen
    if not _root:
        return
    if event == "open":
        change = isinstance(args[2], int) and bool(args[2] & WRITES)
    else:
        change = event in CHANGES
    if change and str(args[0]).startswith(_root):
        _seen += 1
        if _seen == _limit:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_watch)  # a hook stays for ever; without a root it does nothing


def forked(command: Callable[[], None], root: Path, limit: int = 0) -> tuple[int, int]:
    """Run a command in a fork. Return its wait status and how many changes below `root` it made."""
    global _seen, _limit, _root
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        said = os.read(read, 100)
        os.close(read)
        return os.waitpid(child, 0)[1], int(said or 0)
    code = 1
    try:
        _seen, _limit, _root = 0, limit, str(root)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            command()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0) if isinstance(stop.code, int | None) else 1
    finally:
        os.write(write, str(_seen).encode())
        os._exit(code)
