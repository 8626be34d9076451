"""Checkpoints: one folder per step, written in a background thread while training continues.

The thread reads copies in host memory. It writes into a temporary folder, flushes the files to disk, renames the
folder, and only then removes old checkpoints. A crash at any point leaves the previous checkpoint intact.
"""

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastlightgen.atomic import flush
from fastlightgen.engine.direct import save_file
from fastlightgen.engine.hang import HERE
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import STATE
from fastlightgen.files.tensors import read_tensors
from fastlightgen.parallel import ranks

Files = dict[str, dict[str, Tensor]]
T = TypeVar("T")

BUSY, FAILED = 2, 4  # status bits of a rank's save; the loop adds a signal flag in the lowest bit
POLL = 0.05  # seconds between two checks for the files of other ranks
PEER_TIMEOUT = 20.0  # seconds: after an error, rank 0 stops waiting when the folder has not grown for so long


def steps(folder: Path) -> list[int]:
    """Return the steps that have a checkpoint, in ascending order."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def path(folder: Path, step: int) -> Path:
    """Return the folder of one step's checkpoint."""
    return folder / f"step-{step:06d}"


def rank_file(rank: int) -> str:
    """Return the name of the file that one rank writes into a checkpoint."""
    return f"rank-{rank + 1:05d}-of-{ranks.size():05d}"


def host_copy(value: Tensor) -> Tensor:
    """Copy a tensor to host memory, so that the following steps cannot change it."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())


def save(folder: Path, step: int, files: Files, meta: dict, keep: int, every: int = 0, good: int = 0) -> "Saving":
    """Start writing the checkpoint of `step` in a background thread. All ranks call this together.

    The tensors must be copies (`host_copy`), because training changes the originals while the thread writes. Each rank
    writes its own files. Rank 0 creates the temporary folder before any rank writes, and renames it after all files
    are there. Then it removes old checkpoints, except the newest `keep`, those at multiples of `every`, and `good`.
    """
    temporary = folder / f".step-{step:06d}.tmp"
    names = [*files] if ranks.size() == 1 else [rank_file(r) for r in range(ranks.size())]
    error = ""
    if ranks.rank() == 0:
        try:
            start(folder, temporary)
        except OSError as err:
            error = str(err)
    if error := ranks.from_first(error):
        raise not_saved(folder, step, error)

    def work(saving: Saving) -> None:
        write(temporary, files)
        saving.wrote.set()
        if ranks.rank():
            return
        # Look for the other ranks' files instead of a barrier: this thread's collectives could interleave with those of
        # the training thread in another order on each rank.
        while not all((temporary / f"{name}.safetensors").exists() for name in names):
            if saving.stopped.wait(POLL):
                return
        complete(folder, temporary, step, meta | {"step": step, "files": sorted(names)})
        thin(folder, keep, every, good)

    return Saving(folder, step, temporary, work)


class Saving:
    """A checkpoint being written in a background thread, without collectives. All ranks create one together."""

    def __init__(self, folder: Path, step: int, temporary: Path, work: "Callable[[Saving], None]"):
        self.folder, self.step, self.temporary = folder, step, temporary
        self.error: BaseException | None = None
        self.wrote = threading.Event()  # set when this rank's own files are on disk
        self.stopped = threading.Event()  # set to stop waiting for the files of other ranks

        def run() -> None:
            try:
                work(self)
            except BaseException as err:  # kept for the training thread, which raises it in `is_complete`
                self.error = err

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def status(self) -> int:
        """Save status of this rank: BUSY, FAILED, or 0 when done."""
        return BUSY if self.thread.is_alive() else FAILED if self.error else 0

    def is_complete(self, statuses: Sequence[int]) -> bool:
        """Return whether all ranks are done, given the status of each. If any rank failed, raise on all ranks."""
        if not any(s & FAILED for s in statuses):
            return not any(s & BUSY for s in statuses)
        self.stopped.set()
        self.thread.join()
        failed = next(r for r, status in enumerate(statuses) if status & FAILED)
        renamed = path(self.folder, self.step).exists()
        why, renamed = ranks.from_rank(failed, [str(self.error), renamed])
        if self.error and not isinstance(self.error, OSError):  # a mistake in the program: keep its traceback
            raise self.error
        if renamed:
            here = path(self.folder, self.step)
            raise OSError(f"{here}: is complete, but an older checkpoint could not be removed: {why}")
        if ranks.rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        raise not_saved(self.folder, self.step, why)

    def wait(self) -> None:
        """Wait until the checkpoint is complete on all ranks. All ranks call this together."""
        while not self.is_complete(ranks.gathered(self.status())):
            HERE.at("the wait for the checkpoint")  # counts as progress: a slow disk must not look like a hang
            self.thread.join(POLL)

    def leave(self) -> None:
        """Finish writing after an error, without collectives, because other ranks may have died.

        Wait without a limit for the files of this rank. Then rank 0 waits for the files of the other ranks, until the
        folder has not grown for PEER_TIMEOUT seconds.
        """
        while self.thread.is_alive() and not self.wrote.wait(POLL):
            pass
        size, since = -1, time.monotonic()
        while self.thread.is_alive() and time.monotonic() - since < PEER_TIMEOUT:
            self.thread.join(POLL)
            if (now := folder_bytes(self.temporary)) != size:
                size, since = now, time.monotonic()
        self.stopped.set()
        self.thread.join()


class Background:
    """Holds the checkpoint that is being written; there is at most one at a time."""

    saving: Saving | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_) -> None:
        if self.saving:
            self.saving.leave()

    def status(self) -> int:
        """Save status of this rank; 0 when nothing is being written."""
        return self.saving.status() if self.saving else 0

    def started(self) -> list[int]:
        """Return the step of the checkpoint that is being written, as a list of one or no entry."""
        return [self.saving.step] if self.saving else []

    def update(self, statuses: Sequence[int]) -> None:
        """Forget the save once it is complete on all ranks. The loop calls this at every step."""
        if self.saving and self.saving.is_complete(statuses):
            self.saving = None

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete on all ranks."""
        if self.saving:
            self.saving.wait()
            self.saving = None


def not_saved(folder: Path, step: int, error: object) -> ValueError:
    """Build the error of a failed save. It names the last intact checkpoint."""
    last = steps(folder)
    state = f"the last one is {path(folder, last[-1])}" if last else "there is none yet"
    return ValueError(
        f"{path(folder, step)}: the checkpoint could not be saved ({error}); {state}; "
        "make room and run the same command (without overwrite=true) to continue"
    )


def folder_bytes(folder: Path) -> int:
    """Return the total size in bytes of the files in a folder."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:  # the folder, or a file in it, was renamed meanwhile
        return 0


def thin(folder: Path, keep: int, every: int, good: int) -> None:
    """Remove old checkpoints, except the newest `keep`, those at multiples of `every`, and `good`."""
    for old in steps(folder)[:-keep]:
        if old != good and (not every or old % every):
            shutil.rmtree(path(folder, old))


def start(folder: Path, temporary: Path) -> None:
    """Create the temporary folder; remove those left by a run that was killed while saving."""
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def write(temporary: Path, files: Files) -> None:
    """Write this rank's files, flushed to disk. A name without .part means that the file is complete."""
    for name, tensors in files.items():
        save_file(tensors, temporary / f"{name}.part")
    for name in files:
        flush(temporary / f"{name}.part")
        os.replace(temporary / f"{name}.part", temporary / f"{name}.safetensors")


def complete(folder: Path, temporary: Path, step: int, meta: dict) -> None:
    """Write state.json and rename the temporary folder. The rename is flushed as well, by flushing its parent."""
    (temporary / "state.json").write_text(json.dumps(meta | {"check": seal(meta)}))
    flush(temporary / "state.json")
    shutil.rmtree(path(folder, step), ignore_errors=True)
    temporary.rename(path(folder, step))
    flush(folder)


def seal(meta: dict) -> int:
    """A checksum of what state.json says."""
    said = {key: value for key, value in meta.items() if key != "check"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def latest(folder: Path, engine: str) -> tuple[int, dict, list[Path]]:
    """Return (step, state.json, files) of the newest checkpoint, or (0, {}, []) if there is none."""
    found = steps(folder)
    if not found:
        return 0, {}, []
    where = path(folder, found[-1])
    meta = reading(folder, found[-1], lambda: read_json(where / "state.json", STATE, "use the checkpoint before it"))
    if meta.get("engine", "local") != engine:
        raise ValueError(f"{where}: was written by engine={meta.get('engine', 'local')}; continue with that engine")
    return found[-1], meta, [where / f"{name}.safetensors" for name in meta["files"]]


def load(files: list[Path]) -> Files:
    """Read the files of a checkpoint written by one process, by name without suffix."""
    return {file.stem: read_tensors(file, verified=False) for file in files}


Shapes = Mapping[str, Sequence[int]]


def require_same(folder: Path, step: int, found: Shapes, wanted: Shapes) -> None:
    """Raise if the weights of a checkpoint, name -> shape, are not those that this run trains."""
    other = [name for name in found.keys() | wanted.keys() if tuple(found.get(name, ())) != tuple(wanted.get(name, ()))]
    if other:
        name = min(other)
        held, own = (list(where[name]) if name in where else "missing" for where in (found, wanted))
        raise ValueError(
            f"{path(folder, step)}: {name} is {held}, wanted {own}; the checkpoint is of another method or model: use "
            "another run=, or overwrite=true to start anew"
        )


def reading(folder: Path, step: int, read: Callable[[], T]) -> T:
    """Call `read`. If the checkpoint is damaged, raise an error that names it; see also damage.py."""
    try:
        return read()
    except (OSError, KeyError, ValueError, SafetensorError) as err:
        before = [s for s in steps(folder) if s < step]
        earlier = f"step-{before[-1]:06d}" if before else "the beginning"
        raise ValueError(
            f"{path(folder, step)}: damaged or incomplete ({type(err).__name__}: {err}); "
            f"delete it to continue from {earlier}"
        ) from None
