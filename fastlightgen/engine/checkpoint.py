"""Checkpoints: a folder per step, written under a temporary name, flushed, renamed; the oldest are removed last.

A thread writes them from copies in host memory while the steps go on.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastlightgen.engine.direct import save_file
from fastlightgen.engine.hang import HERE
from fastlightgen.parallel import ranks

Files = dict[str, dict[str, Tensor]]
T = TypeVar("T")

BUSY, FAILED = 2, 4  # of a rank that writes; bits, so that a step's one collective carries another flag as well
POLL = 0.05  # seconds between two looks at the other ranks' files
PARTING = 20.0  # seconds without a byte of theirs after which a run that ends with an error takes them for dead


def steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def rank_file(rank: int) -> str:
    """The name of one rank's share of a checkpoint."""
    return f"rank-{rank + 1:05d}-of-{ranks.size():05d}"


def held(value: Tensor) -> Tensor:
    """A copy in host memory, which no later step changes."""
    return torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())


def save(folder: Path, step: int, files: Files, meta: dict, keep: int, every: int = 0, good: int = 0) -> "Saving":
    """Begin to write step's checkpoint, whole or not at all; of the older ones stay the newest `keep`, every `every`
    steps, and `good`. The tensors must be `held`: they are written while the steps go on.

    Each rank writes files of its own. Rank 0 makes the folder before them and gives it its name after them.
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
        while not all((temporary / f"{name}.safetensors").exists() for name in names):
            if saving.stopped.wait(POLL):
                return
        complete(folder, temporary, step, meta | {"step": step, "files": sorted(names)})
        thin(folder, keep, every, good)

    return Saving(folder, step, temporary, work)


class Saving:
    """A checkpoint on its way to disk, by a thread that does no collectives; every rank has one at the same time."""

    def __init__(self, folder: Path, step: int, temporary: Path, work: "Callable[[Saving], None]"):
        self.folder, self.step, self.temporary = folder, step, temporary
        self.error: BaseException | None = None
        self.wrote = threading.Event()  # this rank's own files are on disk
        self.stopped = threading.Event()  # nobody waits for other ranks' files any more

        def run() -> None:
            try:
                work(self)
            except BaseException as err:  # the training thread raises it
                self.error = err

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def state(self) -> int:
        """What this rank knows, for `whole`."""
        return BUSY if self.thread.is_alive() else FAILED if self.error else 0

    def whole(self, states: Sequence[int]) -> bool:
        """Is it complete, by the states of all ranks? Where one of them failed, all stop."""
        if not any(s & FAILED for s in states):
            return not any(s & BUSY for s in states)
        self.stopped.set()
        self.thread.join()
        failed = next(r for r, state in enumerate(states) if state & FAILED)
        complete = path(self.folder, self.step).exists()
        why, complete = ranks.from_rank(failed, [str(self.error), complete])
        if self.error and not isinstance(self.error, OSError):
            raise self.error
        if complete:
            here = path(self.folder, self.step)
            raise OSError(f"{here}: is complete, but an older checkpoint could not be removed: {why}")
        if ranks.rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
        raise not_saved(self.folder, self.step, why)

    def wait(self) -> None:
        """Until it is complete; on all ranks."""
        while not self.whole(ranks.gathered(self.state())):
            HERE.at("the wait for the checkpoint")  # a slow disk is no hang; a rank that is stuck does not get here
            self.thread.join(POLL)

    def leave(self) -> None:
        """The run ends with an error, and collectives may fail: complete it as far as this rank can.

        This rank's own files are waited for without a limit. Rank 0 then waits for those of the other ranks for as
        long as they grow, because a rank may have died.
        """
        while self.thread.is_alive() and not self.wrote.wait(POLL):
            pass
        size, since = -1, time.monotonic()
        while self.thread.is_alive() and time.monotonic() - since < PARTING:
            self.thread.join(POLL)
            if (now := written(self.temporary)) != size:
                size, since = now, time.monotonic()
        self.stopped.set()
        self.thread.join()


class Background:
    """The checkpoint that is under way, at most one."""

    saving: Saving | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_) -> None:
        if self.saving:
            self.saving.leave()

    def state(self) -> int:
        return self.saving.state() if self.saving else 0

    def started(self) -> list[int]:
        """The step of the checkpoint under way, if there is one."""
        return [self.saving.step] if self.saving else []

    def hear(self, states: Sequence[int]) -> None:
        """Once a step, with the states of all ranks."""
        if self.saving and self.saving.whole(states):
            self.saving = None

    def wait(self) -> None:
        if self.saving:
            self.saving.wait()
            self.saving = None


def not_saved(folder: Path, step: int, error: object) -> ValueError:
    last = steps(folder)
    state = f"the last one is {path(folder, last[-1])}" if last else "there is none yet"
    return ValueError(
        f"{path(folder, step)}: the checkpoint could not be saved ({error}); {state}; "
        "make room and run the same command to continue"
    )


def written(folder: Path) -> int:
    """Bytes in a folder so far."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except FileNotFoundError:  # it has got its name, or a file in it
        return 0


def thin(folder: Path, keep: int, every: int, good: int) -> None:
    """Remove what is older than the newest `keep`, not one of every `every` steps and not `good`."""
    for old in steps(folder)[:-keep]:
        if old != good and (not every or old % every):
            shutil.rmtree(path(folder, old))


def start(folder: Path, temporary: Path) -> None:
    for stale in folder.glob(".step-*.tmp"):  # of a run that was killed while saving
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def write(temporary: Path, files: Files) -> None:
    for name, tensors in files.items():
        save_file(tensors, temporary / f"{name}.part")
    for name in files:  # a name without .part says that the file is whole and on disk
        flush(temporary / f"{name}.part")
        os.replace(temporary / f"{name}.part", temporary / f"{name}.safetensors")


def complete(folder: Path, temporary: Path, step: int, meta: dict) -> None:
    (temporary / "state.json").write_text(json.dumps(meta))
    flush(temporary / "state.json")
    shutil.rmtree(path(folder, step), ignore_errors=True)
    temporary.rename(path(folder, step))
    flush(folder)


def flush(target: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest(folder: Path, engine: str) -> tuple[int, dict, list[Path]]:
    """(step, state.json, files) of the newest checkpoint, (0, {}, []) where there is none."""
    found = steps(folder)
    if not found:
        return 0, {}, []
    where = path(folder, found[-1])
    meta = reading(folder, found[-1], lambda: json.loads((where / "state.json").read_text()))
    if meta.get("engine", "local") != engine:
        raise ValueError(f"{where}: was written by engine={meta.get('engine', 'local')}; continue with that engine")
    names = reading(folder, found[-1], lambda: meta["files"])
    return found[-1], meta, [where / f"{name}.safetensors" for name in names]


def load(files: list[Path]) -> Files:
    return {file.stem: load_file(file) for file in files}


def reading(folder: Path, step: int, read: Callable[[], T]) -> T:
    """read(); a damaged checkpoint is named, never skipped in silence."""
    try:
        return read()
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as err:
        before = [s for s in steps(folder) if s < step]
        earlier = f"step-{before[-1]:06d}" if before else "the beginning"
        raise ValueError(
            f"{path(folder, step)}: damaged or incomplete ({type(err).__name__}: {err}); "
            f"delete it to continue from {earlier}"
        ) from None
