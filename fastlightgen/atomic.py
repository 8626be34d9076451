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

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # said by file systems that know no locks


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors of the system that name none: a write to an open file on a full disk."""
    try:
        yield
    except OSError as err:
        if err.errno is not None and err.filename is None:
            err.filename = str(path)
        raise


@contextmanager
def claimed(temporary: Path, wait: bool = True) -> Iterator[int]:
    """Yield an empty file of this process alone, which is deleted at the end unless it got another name.

    A file that a killed process left is taken over. Another process that wants the same file waits, or, without
    `wait`, is refused.
    """
    while True:
        if temporary.is_symlink():
            temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(f"{temporary}: another process holds it; wait for it, or write elsewhere") from None
            except OSError as err:
                if err.errno not in WITHOUT_LOCKS:
                    raise
            if not _is(temporary, handle):  # the process before this one has renamed or deleted it
                continue
            os.ftruncate(handle, 0)
            try:
                with naming(temporary):
                    yield handle
            finally:
                if _is(temporary, handle):
                    temporary.unlink()
            return
        finally:
            os.close(handle)


def _is(path: Path, handle: int) -> bool:
    """Does the name belong to the open file?"""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def check_place(out: str) -> None:
    """Raise ValueError if a file cannot be written at `out`, before the work that ends with it."""
    place = next(p for p in Path(out).absolute().parents if p.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)) or Path(out).is_dir():
        raise ValueError(f"out={out}: cannot be written; give a file in a folder that you may write to")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with claimed(temporary := path.with_name(f".{path.name}.tmp")) as handle:
        with open(handle, "w", encoding="utf-8", closefd=False) as file:
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


def take(path: Path, wait: bool = False) -> IO[str] | None:
    """Lock a file until it is closed, here and in the processes that got it. Without `wait`, None if it is locked."""
    file = lock_file(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file. Without `wait`, yield False if another process holds it."""
    file = take(path, wait)
    if file is None:
        yield False
        return
    with file:
        yield True
