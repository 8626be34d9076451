"""Processes for tests that start without the seconds that importing torch and DeepSpeed takes.

`Fork(["-m", "fastlightgen.train", ...])` behaves like a new Python with these words. A server, itself a new Python,
imports the modules once and forks for each process; it never runs anything else, so that it has one thread.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
LARGEST = 1 << 17  # bytes of a request: words and environment


@cache
def server() -> socket.socket:
    """Start the server; it ends, and its processes with it, when this process closes the socket or ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    env = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-u", __file__, str(theirs.fileno())]
    subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
    theirs.close()
    return ours


class Waited:
    """A process that can be waited for."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or raise TimeoutExpired."""
        raise NotImplementedError

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None


class Fork(Waited):
    """A process with the words of a python command line; the part of subprocess.Popen that tests use.

    Its output goes to files. `first`: modules that the server imports before it forks.
    """

    def __init__(self, words: Sequence[object], env: dict[str, str], first: Sequence[str] = ()):
        self.words, self.returncode = [str(word) for word in words], None
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))
        self.status, theirs = socket.socketpair()
        asked = {"words": self.words, "env": env, "cwd": os.getcwd(), "first": [*first]}
        data, files = json.dumps(asked).encode(), [self.out.fileno(), self.err.fileno(), theirs.fileno()]
        assert len(data) < LARGEST
        socket.send_fds(server(), [data], files)
        theirs.close()
        self.pid = self._read()

    def _read(self) -> int:
        data = self.status.recv(8)
        assert len(data) == 8, "the server of tests/forks.py has ended"
        return int.from_bytes(data, "little", signed=True)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.words, timeout)
            self.returncode = self._read()
            self.status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        for file in (self.out, self.err):
            file.seek(0)
        return self.out.read(), self.err.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ran(words: Sequence[object], env: dict[str, str]) -> subprocess.CompletedProcess:
    """subprocess.run of a python command line, with its output as text."""
    process = Fork(words, env)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.words, process.returncode, out, err)


class Child(Waited):
    """A forked child; the part of subprocess.Popen that torchrun uses."""

    def __init__(self, pid: int):
        self.pid, self.returncode, self.end = pid, None, os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a rank", timeout)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.end)
        return self.returncode


def serve(control: socket.socket) -> dict[str, Any]:
    """Answer requests until the client has gone. Return in the forks only, with the request."""
    children: dict[int, tuple[Child, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([control, *children], [], [])
        for end in ready:
            if end in children:
                child, status = children.pop(end)
                with contextlib.suppress(OSError):  # the test has gone
                    status.sendall(child.wait().to_bytes(8, "little", signed=True))
                status.close()
        if control not in ready:
            continue
        data, files, *_ = socket.recv_fds(control, LARGEST, 3)
        if not data:
            for child, _ in children.values():
                os.kill(child.pid, signal.SIGKILL)
            os._exit(0)
        asked, status = json.loads(data), socket.socket(fileno=files[2])
        if new := [name for name in asked["first"] if name not in sys.modules]:
            for name in new:
                importlib.import_module(name)
            gc.collect()
            gc.freeze()  # DeepSpeed collects garbage at every start of an engine, and would look through torch
        if pid := os.fork():
            child = Child(pid)
            children[child.end] = child, status
            status.sendall(pid.to_bytes(8, "little", signed=True))
            for file in files[:2]:
                os.close(file)
            continue
        for end, (_, other) in children.items():
            os.close(end)
            other.close()
        for sock in (control, status):
            sock.close()
        for number, file in enumerate(files[:2], 1):
            os.dup2(file, number)
            os.close(file)
        os.setsid()
        return asked


def become(words: list[str], env: dict[str, str], cwd: str) -> None:
    """Do in this fork what `python *words` does: -m MODULE, -c CODE or a file, and its words."""
    os.chdir(cwd)
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    os.environ.clear()
    os.environ.update(env)
    random.seed()
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    words = [word for word in words if word != "-u"]
    kind, name, rest = (words[0], words[1], words[2:]) if words[0].startswith("-") else ("", words[0], words[1:])
    sys.path[:1] = [str(Path(name).resolve().parent) if not kind else cwd, *paths]
    sys.argv = [name if kind != "-c" else "-c", *rest]
    if name == "torch.distributed.run":
        fork_ranks(int(rest[rest.index("--nproc-per-node") + 1]))
    if kind == "-m":
        sys.modules.pop(name, None)  # runpy warns about modules that it runs twice
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(name, "<string>", "exec"), module.__dict__)
    else:
        runpy.run_path(name, run_name="__main__")


def fork_ranks(count: int) -> None:
    """Let torchrun start its ranks as forks. They are made now, while this process has one thread, and wait."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    waiting = []
    for _ in range(count):
        read, write = os.pipe()
        if pid := os.fork():
            os.close(read)
            waiting.append((Child(pid), write))
            continue
        os.close(write)
        for child, other in waiting:
            os.close(child.end)
            os.close(other)
        with open(read) as pipe:
            asked = pipe.read()
        if not asked:
            os._exit(1)  # torchrun has ended
        os.setsid()
        become(**json.loads(asked))
        sys.exit()

    def start(args: Sequence[str], env: dict[str, str], **_) -> Child:
        child, write = waiting.pop(0)
        with open(write, "w") as pipe:
            json.dump({"words": args[1:], "env": env, "cwd": os.getcwd()}, pipe)
        return child

    subprocess_handler.Popen = start


if __name__ == "__main__":
    import torch.distributed.run  # noqa: F401

    import fastlightgen.train  # noqa: F401

    gc.collect()
    gc.freeze()
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    become(asked["words"], asked["env"], asked["cwd"])
