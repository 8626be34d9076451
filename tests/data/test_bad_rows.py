"""A row that no clip can be made of is skipped with a reason, whatever stands in the place of its file."""

import json
import os
import socket
import struct
import zlib

import pytest
from helpers import numbered, write_video
from PIL import Image

from fastlightgen.data.lists import read_list
from fastlightgen.data.video import Unusable, read_clip

SIZE = [(32, 48)]


def huge_picture(path) -> None:
    """A PNG of 60 bytes that claims 50,000 x 50,000 pixels."""
    Image.new("1", (5, 3)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 50_000, 50_000)
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind",
    ["pipe", "socket", "broken link", "loop", "folder", "long name", "null byte", "start", "end", "huge", "text"],
)
def test_it_is_skipped_with_a_reason(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    row = {"file": "a.mp4", "caption": "x"}
    if kind == "pipe":
        os.mkfifo("a.mp4")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("a.mp4")
    elif kind == "broken link":
        os.symlink("absent", "a.mp4")
    elif kind == "loop":
        os.symlink("a.mp4", "a.mp4")
    elif kind == "folder":
        os.mkdir("a.mp4")
    elif kind == "huge":
        os.mkdir("a.mp4")
        for n in range(5):
            huge_picture(tmp_path / "a.mp4" / f"{n}.png")
    elif kind == "text":
        (tmp_path / "a.mp4").write_bytes(b"handler \xe9" * 20)
    elif kind in ("start", "end"):
        write_video(tmp_path / "a.mp4", numbered(12), 10)
        row[kind] = 1e308 if kind == "start" else -1e308
    else:
        row["file"] = "x" * 5_000 + ".mp4" if kind == "long name" else "a\0b.mp4"
    (tmp_path / "good.mp4").symlink_to(write_video(tmp_path / "real.mp4", numbered(12), 10))
    (tmp_path / "l.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (row, {"file": "good.mp4", "caption": "y"}))
    )
    bad, good = read_list(tmp_path / "l.jsonl", 0)
    with pytest.raises(Unusable) as error:
        read_clip(bad, 10, 5, SIZE)
    assert str(error.value) and "\n" not in str(error.value)
    assert read_clip(good, 10, 5, SIZE).shape == (5, 32, 48, 3)
