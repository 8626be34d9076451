"""manifest.json of an export: size and checksum of every file, written last, verified before parts are loaded.

A model folder has checksums.json for its tensors; a pipeline folder also holds parts that other programs read.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.files.border import read_json, unread
from fastlightgen.files.kinds import MANIFEST as SHAPE
from fastlightgen.files.tensors import file_checksum
from fastlightgen.parallel.log import bar

MANIFEST = "manifest.json"
FREE = (MANIFEST, "README.md")  # the card is for people, who may edit it
Entry = dict[str, int]  # size in bytes, sum


def entry(file: Path) -> Entry:
    """The record of one file."""
    size, total = file_checksum(file)
    return {"size": size, "sum": total}


def names_in(folder: Path) -> Iterator[str]:
    """Names of all files below a folder, relative to it, in order. Links are followed, each folder once."""
    seen = set[str]()
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if os.path.realpath(os.path.join(here, f)) not in seen)
        seen |= {os.path.realpath(os.path.join(here, f)) for f in folders}
        for file in sorted(files):
            name = (Path(here) / file).relative_to(folder).as_posix()
            if name not in FREE:
                yield name


def write_manifest(folder: Path, known: Mapping[str, Entry]) -> None:
    """Record all files of a folder; `known`: records of the sources that some of them were copied from."""
    files = {name: known.get(name) or entry(folder / name) for name in names_in(folder)}
    write_json(folder / MANIFEST, {"files": files})


def verify_files(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raise ValueError if a recorded file is missing or another one; a folder without a manifest passes.

    `wanted`: which files to read, by name.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    found: dict[str, Any] = read_json(path, SHAPE, "export again")["files"]
    how = f"copy the folder again or export again; if you changed the file yourself, delete {MANIFEST}"
    chosen = {name: record for name, record in found.items() if wanted(name)}
    if other := [name for name in chosen if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{path}: names a file outside the folder, {other[0]!r}; {how}")
    total = sum(record["size"] for record in chosen.values())
    with bar(total, "verifying files", True, unit="B", scale=True, delay=5) as progress:
        for name, record in chosen.items():
            file = folder / name
            try:
                if (size := os.stat(file).st_size) != record["size"]:
                    raise ValueError(f"{file}: has {size} bytes, {MANIFEST} says {record['size']}; {how}")
                if entry(file) != record:
                    raise ValueError(f"{file}: is damaged (its checksum is wrong); {how}")
            except OSError as err:
                raise ValueError(f"{file}: {unread(err)}; {how}") from None
            progress.update(record["size"])
