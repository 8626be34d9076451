"""Checkpoints: a folder per step, written under a temporary name, flushed, renamed; the oldest are removed last."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastlightgen.engine import ranks

Files = dict[str, dict[str, Tensor]]
T = TypeVar("T")


def steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def rank_file(rank: int) -> str:
    """The name of one rank's share of a checkpoint."""
    return f"rank-{rank + 1:05d}-of-{ranks.size():05d}"


def save(folder: Path, step: int, files: Files, meta: dict, keep: int, every: int = 0, good: int = 0) -> None:
    """Write step's checkpoint whole or not at all; of the older ones stay the newest `keep`, `every` so many, `good`.

    Each rank writes files of its own. Rank 0 makes the folder before them and gives it its name after them.
    """
    temporary, first = folder / f".step-{step:06d}.tmp", ranks.rank() == 0
    names = [*files] if ranks.size() == 1 else [rank_file(r) for r in range(ranks.size())]
    meta = meta | {"step": step, "files": sorted(names)}
    try:
        together(lambda: start(folder, temporary) if first else None)
        together(lambda: write(temporary, files))
        together(lambda: complete(folder, temporary, step, meta) if first else None)
    except (OSError, SafetensorError) as err:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        last = steps(folder)
        state = f"the last one is {path(folder, last[-1])}" if last else "there is none yet"
        raise ValueError(
            f"{path(folder, step)}: the checkpoint could not be saved ({err}); {state}; "
            "make room and run the same command to continue"
        ) from None
    for old in steps(folder)[:-keep] if first else []:
        if old != good and (not every or old % every):
            shutil.rmtree(path(folder, old))


def together(work: Callable[[], None]) -> None:
    """Do a part of the work on every rank; where one fails, all fail."""
    error: Exception | None = None
    try:
        work()
    except (OSError, SafetensorError) as err:
        error = err
    if ranks.anyone(error is not None):
        raise error or OSError("on another rank")


def start(folder: Path, temporary: Path) -> None:
    for stale in folder.glob(".step-*.tmp"):  # of a run that was killed while saving
        shutil.rmtree(stale)
    temporary.mkdir(parents=True)


def write(temporary: Path, files: Files) -> None:
    for name, tensors in files.items():
        file = temporary / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file)
    for name in files:
        flush(temporary / f"{name}.safetensors")


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
