"""How a command ends: what a user can mend is one line and exit code 2, an interruption another line and code."""

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

REQUEUE = 75  # exit code of a run that a scheduler stopped, to be started again (EX_TEMPFAIL)
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
LESS = "`fastlightgen plan` with the same keys shows what the memory is needed for"
REMEDIES = {  # for errors of the system
    errno.ENOSPC: "make room, and the same command continues",
    errno.EDQUOT: "make room, and the same command continues",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), and the same command continues",
    errno.EACCES: "give a place that you may write to, or change its permissions",
    errno.EPERM: "give a place that you may write to, or change its permissions",
    errno.EROFS: "give a place that can be written to",
    errno.EMFILE: "raise the limit on open files (ulimit -n 1024), and the same command continues",
    errno.ENFILE: "close other programs, and the same command continues",
    errno.ENOMEM: "free some memory, and the same command continues",
}
STOPPED_READING = 128 + signal.SIGPIPE  # exit code after `| head`, as a shell gives it


def guarded(work: Callable[[], None]) -> None:
    """Do the work of a command. A mistake of the user becomes one line and exit code 2 (a traceback with FLG_DEBUG=1).

    A reader of the output that ends early, as `head` does, ends the command quietly.
    """
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush succeeds
        sys.exit(STOPPED_READING)
    except (ValueError, OSError, MemoryError) as err:  # ValueError is for users, `assert` for programmers
        if os.environ.get("FLG_DEBUG") == "1":
            raise
        sys.exit(report(err))
    except RuntimeError as err:  # torch has no class of its own for memory that the host refuses
        if os.environ.get("FLG_DEBUG") == "1" or not any(said in str(err) for said in NO_MEMORY):
            raise
        sys.exit(report(MemoryError()))
    except KeyboardInterrupt as stop:
        sys.exit(report(stop))


def report(err: BaseException) -> int:
    """Print one line about an error that a user can mend, or about an interruption; returns the exit code."""
    if isinstance(err, KeyboardInterrupt):
        print(str(err) or "interrupted", file=sys.stderr)
    else:
        said = f"{str(err) or 'out of memory'}; {LESS}" if isinstance(err, MemoryError) else str(err)
        if isinstance(err, OSError) and err.errno in REMEDIES:
            said = f"{said}; {REMEDIES[err.errno]}"
        line = f"error: {plain(said)}"
        print(line, file=sys.stderr)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun repeats it at the end of its own report
            message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
    return exit_code(err)


def plain(text: str) -> str:
    """A message on one line, without control characters and not longer than anybody reads."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= 2_000 else f"{line[:1_997]}..."


def exit_code(err: BaseException) -> int:
    """2: a mistake of the user; 75: stopped by a scheduler; 130: stopped by Ctrl-C."""
    if not isinstance(err, KeyboardInterrupt):
        return 2
    return REQUEUE if getattr(err, "requeue", False) else 130
