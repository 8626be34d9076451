"""Writes files that appear complete or not at all: a temporary name, a flush to disk, a rename, a flush of the folder.

Without the flushes a power cut can leave the new name with no content. Links are not followed: a link in the place of a
temporary file or a lock would otherwise lead the write to another file.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
        file.write(text)
    put(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def put(temporary: Path, path: Path) -> None:
    """Flush a file or a folder's files to disk, and give it its name."""
    for part in sorted(temporary.rglob("*")) if temporary.is_dir() else []:
        flush(part)
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def flush(target: Path) -> None:
    """Force a file, or the entries of a folder, to disk."""
    handle = os.open(target, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_file(path: Path) -> IO[str]:
    """Open a file to lock it; it is made if it is absent, and its content stays."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
    except OSError as err:
        if err.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path}: is a link, so it is not used as a lock; delete it") from None


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file. Without `wait`, yield False if another process holds it."""
    with lock_file(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
