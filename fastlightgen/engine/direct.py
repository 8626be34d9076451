"""Write safetensors files with direct I/O. Copying through the page cache would take CPU time from the steps.

Direct I/O (O_DIRECT) needs aligned memory and aligned sizes, so that everything passes through one aligned buffer.
"""

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlightgen.files.tensors import summed

DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has no direct I/O
BLOCK = 4096  # bytes: the alignment of memory and sizes that direct I/O requires
CHUNK = 2**24  # bytes per write; a multiple of BLOCK
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}


def save_file(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors in host memory to a safetensors file: 8 bytes of header size, the header as JSON, the data.

    The header holds a checksum of each tensor.
    """
    header: dict[str, dict] = {"__metadata__": summed(tensors)}
    offset = 0
    # Large elements first: every tensor then starts at a multiple of its element size.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in ordered:
        v, begin = tensors[name], offset
        offset += v.numel() * v.element_size()
        header[name] = {"dtype": NAMES[v.dtype], "shape": list(v.shape), "data_offsets": [begin, offset]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    parts = [np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)]
    parts += [tensors[name].reshape(-1).view(torch.uint8).numpy() for name in ordered]
    pages, full = mmap.mmap(-1, CHUNK), 0  # anonymous memory, aligned to pages; the bytes in it so far
    buffer = np.frombuffer(pages, np.uint8)
    with direct(file) as handle:
        for part in parts:
            while len(part):
                some, part = part[: CHUNK - full], part[CHUNK - full :]
                np.copyto(buffer[full : full + len(some)], some)
                full += len(some)
                if full == CHUNK:
                    write_all(handle, pages, CHUNK)
                    full = 0
        # The last write is rounded up to whole blocks; truncating removes the excess.
        write_all(handle, pages, -(-full // BLOCK) * BLOCK)
        os.ftruncate(handle, sum(map(len, parts)))


@contextmanager
def direct(file: Path) -> Iterator[int]:
    """Create a file and open it for direct I/O, or for ordinary writes if the file system refuses."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        handle = os.open(file, flags | DIRECT, 0o666)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        handle = os.open(file, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def write_all(handle: int, pages: mmap.mmap, size: int) -> None:
    """Write the first `size` bytes of the buffer; one call of os.write may take fewer."""
    done = 0
    with memoryview(pages) as view:
        while done < size:
            try:
                done += os.write(handle, view[done:size])
            except OSError as err:
                flags = fcntl.fcntl(handle, fcntl.F_GETFL)
                if err.errno != errno.EINVAL or not flags & DIRECT:
                    raise
                fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~DIRECT)  # some file systems refuse only here
