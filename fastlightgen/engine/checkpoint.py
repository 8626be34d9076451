"""Checkpoints: a folder per step, written under a temporary name, flushed, renamed; the oldest are removed last."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Files = dict[str, dict[str, Tensor]]


def steps(folder: Path) -> list[int]:
    """Steps with a checkpoint, ascending."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def save(folder: Path, step: int, files: Files, meta: dict, keep: int) -> None:
    """Write step's checkpoint whole or not at all, then drop all but the newest `keep`."""
    temporary = folder / f".step-{step:06d}.tmp"
    try:
        for stale in folder.glob(".step-*.tmp"):  # of a run that was killed while saving
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        for name, tensors in files.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps(meta | {"step": step, "files": sorted(files)}))
        for file in temporary.iterdir():
            flush(file)
        shutil.rmtree(path(folder, step), ignore_errors=True)
        temporary.rename(path(folder, step))
        flush(folder)
    except (OSError, SafetensorError) as err:
        shutil.rmtree(temporary, ignore_errors=True)
        last = steps(folder)
        state = f"the last one is {path(folder, last[-1])}" if last else "there is none yet"
        raise ValueError(
            f"{path(folder, step)}: the checkpoint could not be saved ({err}); {state}; "
            "make room and run the same command to continue"
        ) from None
    for old in steps(folder)[:-keep]:
        shutil.rmtree(path(folder, old))


def flush(target: Path) -> None:
    """Force a file or a folder's entries to disk."""
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_latest(folder: Path) -> tuple[Files, dict] | None:
    """The newest checkpoint, or None where there is none. A damaged one is named, never skipped in silence."""
    found = steps(folder)
    if not found:
        return None
    latest = path(folder, found[-1])
    try:
        meta = json.loads((latest / "state.json").read_text())
        return {name: load_file(latest / f"{name}.safetensors") for name in meta["files"]}, meta
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as err:
        earlier = f"step-{found[-2]:06d}" if len(found) > 1 else "the beginning"
        raise ValueError(
            f"{latest}: damaged or incomplete ({type(err).__name__}: {err}); delete it to continue from {earlier}"
        ) from None
