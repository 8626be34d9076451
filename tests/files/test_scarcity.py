"""What a machine may lack: room on the disk, permissions, open files, memory, a clock that goes forward, a free folder.

Every command that writes works all the same, or ends with one line that names the file and what to do. Then the same
command continues to the result of an undisturbed run.
"""

import ctypes
import fcntl
import os
import resource
import shutil
import struct
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from crashes import CASES
from helpers import assert_same

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, PRIVATE, REMOUNT = 0x20000, 0x44000, 0x20  # CLONE_NEWNS; MS_PRIVATE and MS_REC; MS_REMOUNT
WRITE_ANYWHERE = 1 << 1  # CAP_DAC_OVERRIDE


def forked(command: Callable[[], None], said: Path, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run a command in a fork, after `prepare`. Return its exit code, negative for a signal, and its stderr."""
    said.touch()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_TRUNC), 2)
        os.closerange(3, 4096)  # what the tests before this one have left open
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        prepare()
        command()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # pytest would take it for its own
        traceback.print_exc()
    finally:
        os._exit(code)


SLOW = ("stage2", "stage3", "evaluate")  # which write through the same functions as the others
QUICK = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


def one_line(said: str) -> str:
    """The error line of a command."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said[-2_000:]
    return lines[0]


@pytest.fixture
def ran(case, tmp_path):
    """The command, its outcome, the folder of its runs, and the outcome of an undisturbed one in `whole`."""
    torch.set_num_threads(1)
    (tmp_path / "x").mkdir()
    command, outcome = case
    code, said = forked(lambda: command(tmp_path / "x" / "whole"), tmp_path / "said")
    assert code == 0, said
    return command, outcome, tmp_path / "x", outcome(tmp_path / "x" / "whole")


def sizes(folder: Path, names: str = "*") -> list[int]:
    return [f.stat().st_size for f in folder.rglob(names) if f.is_file()]


@pytest.mark.parametrize("case", QUICK, indirect=True)
def test_it_goes_on_when_there_is_room_again(ran, tmp_path):
    """64 open files suffice. No file may be as long as the longest: the disk is full for it, in any library."""
    command, outcome, places, wanted = ran
    longest = max(sizes(places, "*.safetensors") or sizes(places))  # a clip of training may fail without an end

    def cramped() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest - 1, longest - 1))

    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    where = places / "again"
    code, said = forked(lambda: command(where), tmp_path / "said", cramped)
    assert code == 2
    line = one_line(said)
    assert str(places) in line and "File too large" in line
    assert "make room" in line or "raise the limit on file sizes (ulimit -f)" in line
    assert not [f for f in places.glob(".*tmp*") if f.is_file()]  # nothing half is left beside a result
    code, said = forked(lambda: command(where), tmp_path / "said", few_files)
    assert code == 0, said
    assert_same(outcome(where), wanted)


def without_privileges() -> None:
    """Root may write anywhere, unless it gives that up."""
    header, data = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert LIBC.capget(header, data) == 0
    effective, permitted, *rest = struct.unpack("6I", data.raw)
    left = struct.pack("6I", effective & ~WRITE_ANYWHERE, permitted & ~WRITE_ANYWHERE, *rest)
    assert LIBC.capset(header, left) == 0


@pytest.mark.parametrize("case", QUICK, indirect=True)
def test_a_folder_that_is_read_only(case, tmp_path):
    command, _ = case
    places = tmp_path / "x"
    places.mkdir(0o555)
    code, said = forked(lambda: command(places / "run"), tmp_path / "said", without_privileges)
    assert code == 2
    line = one_line(said)
    assert str(places) in line and "that you may write to" in line and list(places.iterdir()) == []


BUSY = {"stage0": "run/.lock", "encode": "run/.lock-0", "export": ".run.lock"}


@pytest.mark.parametrize("case", BUSY, indirect=True)
def test_a_second_process_on_a_folder_is_refused(case, tmp_path, request):
    command, _ = case
    lock = tmp_path / "x" / BUSY[request.node.callspec.params["case"]]
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, said = forked(lambda: command(tmp_path / "x" / "run"), tmp_path / "said")
        assert code == 2 and "another process" in one_line(said) and str(tmp_path / "x") in said
        assert {p.name for p in lock.parent.iterdir()} <= {lock.name, "parts"}


@pytest.mark.parametrize("case", ["generate", "report"], indirect=True)
def test_two_processes_that_write_one_file(ran, tmp_path):
    """Each writes all of it; the last one stays."""
    command, outcome, places, wanted = ran
    children = []
    for n in range(2):
        if not (child := os.fork()):
            os._exit(forked(lambda: command(places / "one"), tmp_path / f"said{n}")[0])
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert_same(outcome(places / "one"), wanted)
    assert not [f for f in places.rglob("*") if "tmp" in f.name]


@pytest.mark.parametrize("case", ["stage0", "encode"], indirect=True)
def test_a_clock_that_jumps(ran, tmp_path, monkeypatch):
    """Back an hour, forth a day: progress and estimates use a clock that does not."""
    command, outcome, places, wanted = ran
    honest, calls = time.time, count()

    def jumping() -> float:
        return honest() + (86_400, -3_600, 0)[next(calls) % 3]

    def prepare() -> None:
        import tqdm.std

        time.time = tqdm.std.time = jumping

    code, said = forked(lambda: command(places / "again"), tmp_path / "said", prepare)
    assert code == 0, said
    assert_same(outcome(places / "again"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("megabytes", [1, 8, 32])
def test_little_memory(ran, tmp_path, megabytes):
    """So much address space beyond what the process has: the command works, or one line says what it lacks."""
    command, outcome, places, wanted = ran

    def little() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)

    code, said = forked(lambda: command(places / "again"), tmp_path / "said", little)
    assert code in (0, 2), said[-2_000:]
    if code:
        assert "memory" in one_line(said)
        code, said = forked(lambda: command(places / "again"), tmp_path / "said")
    assert code == 0, said
    assert_same(outcome(places / "again"), wanted)


def mounted(size: int, place: Path, flags: int = 0) -> bool:
    """Mount a small file system of memory."""
    return LIBC.mount(b"none", str(place).encode(), b"tmpfs", flags, f"size={size}".encode()) == 0


def own_mounts() -> bool:
    """Leave the mounts of the other processes alone."""
    return LIBC.unshare(NEW_MOUNTS) == 0 and LIBC.mount(b"none", b"/", None, PRIVATE, None) == 0


@pytest.mark.slow
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_full_file_system(ran, tmp_path, part):
    """A disk of a part of what the command writes fills up; then it grows, and the same command continues."""
    command, outcome, places, wanted = ran
    total = sum(sizes(places))
    disk = tmp_path / "disk"
    disk.mkdir()

    def whole_story() -> None:
        if not (own_mounts() and mounted(max(4096, int(total * part)), disk)):
            raise SystemExit(77)
        code, said = forked(lambda: command(disk / "run"), tmp_path / "said1")
        assert code in (0, 2), said
        if code:
            assert str(disk) in one_line(said) and "make room" in said, said
        assert mounted(total * 4 + (16 << 20), disk, REMOUNT)
        code, said = forked(lambda: command(disk / "run"), tmp_path / "said1")
        assert code == 0, said
        assert_same(outcome(disk / "run"), wanted)

    code, said = forked(whole_story, tmp_path / "said")
    if code == 77:
        pytest.skip("this machine does not allow mounts")
    assert code == 0, said
    shutil.rmtree(disk, ignore_errors=True)
