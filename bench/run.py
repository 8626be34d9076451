"""One run of bench/gpu.py: its folder, its log, its time, and the commands that it starts."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from machine import ROOT

LARGEST = 15 << 20  # bytes of a file of results


class Run:
    """One run: its folder, its log, and its time."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.folder: Path | None = None
        self.child: subprocess.Popen | None = None
        self.failed = False
        self.waiting: list[str] = []  # what was said before there was a folder

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, line: str, bad: bool = False) -> None:
        print(line, flush=True)
        self.failed |= bad
        self.waiting.append(line)
        if self.folder:
            self.write("run.log", "".join(f"{line}\n" for line in self.waiting))
            self.waiting.clear()

    def write(self, name: str, text: bytes | str) -> None:
        """Append to a file of results; if that fails, on a full disk for one, print the text."""
        text = text.encode() if isinstance(text, str) else text
        try:
            with open(self.folder / name, "ab") as file:
                if file.tell() < LARGEST:
                    file.write(text)
        except OSError as error:
            print(f"{name}: {error.strerror}: {text.decode(errors='replace').rstrip()}", flush=True)

    def call(self, command: list, log: str, limit: float, **env: str) -> int:
        """Run a command, append its output to a file, stop it at the limit. Return its exit code, 124 at the limit."""
        limit = min(limit, self.left())
        if limit < 5:
            return 124
        words = list(map(str, command))
        self.write(log, f"$ {' '.join(words)}\n")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.child = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, **pipes)
        reader = threading.Thread(target=self._copy, args=(self.child.stdout.fileno(), log), daemon=True)
        reader.start()
        try:
            code = self.child.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop()
            code = 124
        reader.join(5)  # a process that the command left behind may hold the pipe open
        self.child = None
        return code

    def last(self, log: str) -> str:
        """The last line of a log."""
        try:
            text = (self.folder / log).read_text(errors="replace").strip()
        except OSError:
            text = ""
        return text.rpartition("\n")[2] or "it printed nothing"

    def _copy(self, pipe: int, log: str) -> None:
        with contextlib.suppress(OSError):  # a process that was left behind: the pipe is closed under it
            while chunk := os.read(pipe, 1 << 16):
                self.write(log, chunk)

    def stop(self) -> None:
        """End the running command: ask, and after five seconds kill it and what it started."""
        if self.child and self.child.poll() is None:
            started = below(self.child.pid)
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(5)
            for pid in started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.child.wait()


def below(pid: int) -> list[int]:
    """A process and all that it started: a compiler, or the program that a profiler runs."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:  # grows as it goes
        found += children.get(parent, [])
    return found


def folder_for(found: dict, out: Path, run: Run) -> Path:
    """A new folder for the results; in a temporary place if OUT cannot be written."""
    gpu = (found["torch"].get("gpu") or {}).get("name") or "cpu"
    date = re.sub(r"[-:]", "", found["date"])
    name = f"{date}-" + re.sub(r"[^a-z0-9.]+", "-", f"{gpu}-{found['commit'] or found['sources']}".lower())
    for count in range(1, 100):  # another run of the same second
        folder = out / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir(parents=True)
            (folder / "run.log").write_text("\n")  # a full disk shows only when bytes are written
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            run.say(f"OUT={out}: {error.strerror}; the results go to a temporary folder and to this output", bad=True)
            return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    raise SystemExit(f"OUT={out}: 99 runs of this second")
