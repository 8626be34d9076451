"""safetensors files: written with a checksum of every tensor, and verified when they are read.

The checksum adds up the bytes as 64-bit integers in blocks of 4 KiB, and takes the CRC-32 of the sums. It sees a
flipped bit, a lost or moved block and a shortened file, and runs at the speed of memory. It does not see 64-bit words
that change places within a block, and does not protect against an attacker.
"""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastlightgen.atomic import claimed, put
from fastlightgen.files.border import opened, parsed, regular
from fastlightgen.files.onepass import added, read_once
from fastlightgen.files.schema import Shape, table, whole

SUMS = "sums"  # metadata key: name of a tensor -> its checksum, as JSON
SHAPE = table(whole(0, 2**32), most=10_000_000)
CHUNK = 1 << 22  # bytes


def checksum(value: Tensor) -> int:
    """The checksum of a tensor's bytes."""
    return read_once(value)[0]


def file_checksum(path: Path) -> tuple[int, int]:
    """The number of a file's bytes, and their checksum: that of a tensor with these bytes."""
    size, out, buffer = 0, 0, torch.empty(CHUNK, dtype=torch.uint8)
    with opened(path) as file:
        while count := file.readinto(buffer.numpy().data):  # type: ignore[attr-defined]  # of a buffered reader
            size, out = size + count, added(buffer[:count], out)
    return size, out


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: checksum(v) for name, v in tensors.items()}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place; what the disk refuses is an OSError, as for other files."""
    file.touch()  # to learn the mode that this user's files have: safetensors makes files for their owner alone
    mode = file.stat().st_mode & 0o777
    try:
        save_file(dict(tensors), file, metadata)
        file.chmod(mode)
    except SafetensorError as err:
        code = re.search(r"os error (\d+)", said := " ".join(str(err).split()))
        raise OSError(int(code[1]) if code else errno.EIO, said, str(file)) from None


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that appears complete or not at all. safetensors refuses strides, so they are copied."""
    written = file.with_suffix(".new.tmp")
    with claimed(file.with_suffix(".tmp")):  # not the file itself: safetensors puts another one in its place
        try:
            written.unlink(missing_ok=True)
            write_tensors(written, {k: v.contiguous() for k, v in tensors.items()}, metadata)
            put(written, file)
        finally:
            written.unlink(missing_ok=True)


def open_tensors(file: Path) -> Any:
    """Open a safetensors file: a context of tensors that are mapped, not read."""
    return safe_open(regular(file, kind="file of tensors"), framework="pt")


def read_tensors(file: Path, verified: bool = True) -> dict[str, Tensor]:
    """Read all tensors of a file and verify them if it holds checksums. Raise ValueError if it is damaged."""
    try:
        with open_tensors(file) as f:
            sums = sums_of(f.metadata(), file)
            out = {name: f.get_tensor(name) for name in f.keys()}
    except (OSError, SafetensorError) as err:
        raise ValueError(f"{file}: damaged or missing ({err})") from None
    for name in sums if verified else ():
        verify(name, out.get(name), sums[name], file)
    return out


def read_metadata(file: Path, key: str, shape: Shape, remedy: str) -> Any:
    """Read the JSON under one key of a file's metadata, and check its shape."""
    try:
        with open_tensors(file) as f:
            return parsed(f.metadata()[key], shape, str(file), remedy)
    except (OSError, SafetensorError, KeyError, TypeError) as err:
        raise ValueError(f"{file}: cannot be read ({err}); {remedy}") from None


def verify(name: str, value: Tensor | None, wanted: int, file: Path) -> None:
    """Raise ValueError if a tensor is missing or not the one that was written."""
    if value is None:
        raise ValueError(f"{file}: lacks {name}")
    check_sum(name, checksum(value), wanted, file)


def check_sum(name: str, found: int, wanted: int, file: Path) -> None:
    """Raise ValueError if a tensor does not have the checksum that was written with it."""
    if found != wanted:
        raise ValueError(f"{file}: {name} is damaged (its checksum is wrong)")


def sums_of(metadata: Mapping[str, str] | None, file: Path) -> dict[str, int]:
    """The checksums in a file's metadata; {} if it was written without."""
    found: dict[str, int] = parsed((metadata or {}).get(SUMS, "{}"), SHAPE, f"{file}, checksums", "make it again")
    return found


def summed(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata that hold the tensors' checksums."""
    return {SUMS: json.dumps(checksums(tensors))}
