"""The border: what is no regular file, too large, too deep or of another shape is refused in one line."""

import ast
import json
import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from fastlightgen.files import border
from fastlightgen.files.schema import items, record, text, whole

PACKAGE = Path(border.__file__).parents[1]
SHAPE = record({"a": items(whole(0, 9), rising=True)}, {"note": text(5)})
# Calls that read a file. Outside files/ only these modules may call them.
READS = {"open", "load", "loads", "safe_load", "safe_open", "load_file", "read_text", "read_bytes", "full_load"}
OTHERS = {"json", "yaml", "torch", "Image", "av", "pickle", "numpy", "np", "safetensors"}
ALLOWED = {
    "planner/fit.py": {"read_text"},  # /proc and control groups
    "ops/dispatch.py": {"read_text", "loads"},  # written by the build
    "ops/gemm.py": {"read_text", "loads"},  # products.json of the package
    "ops/tune.py": {"read_text", "loads"},
    "report.py": {"read_text"},  # the page's own parts
    "engine/log.py": {"open"},  # appends
    "sweeps/processes.py": {"open"},  # appends
    "engine/hang.py": {"loads"},  # from the store of the ranks
    "parallel/ranks.py": {"loads"},
    "models/folder/files.py": {"load"},  # pickles of plain tensors, with allow_pt
    "models/folder/released.py": {"loads"},  # of what was dumped a moment ago
    "pipelines/export.py": {"loads"},
    "pipelines/step_generate.py": {"load", "loads", "open", "read_text"},  # a program of its own; exports hold a copy
    "data/writer.py": {"loads"},
    "data/frames.py": {"open"},  # writes a video
    "decoder/clips.py": {"open"},
    "data/video.py": {"open"},  # PyAV opens what `regular` has checked
    "config/layers.py": {"safe_load"},  # a list on the command line
    "engine/folder.py": {"read_bytes"},  # its own config.yaml, to put it back
    "engine/writers.py": {"open", "read_bytes"},  # the clips that this run has just written
    "parallel/threads.py": {"read_text"},  # /proc and control groups
    "page/clips.py": {"open"},  # previews, GIF only
}


def refused(call, *args) -> str:
    with pytest.raises(ValueError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_fits_is_read(tmp_path):
    assert border.read_json(write(tmp_path / "a.json", {"a": [1, 5], "note": "x", "more": None}), SHAPE)["a"] == [1, 5]
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert border.read_json(tmp_path / "bom.json") == [1]
    assert border.read_yaml(write(tmp_path / "a.yaml", "a: [1, 2]\nb: &x {c: 1}\nd: *x")) == {
        "a": [1, 2], "b": {"c": 1}, "d": {"c": 1}
    }  # fmt: skip
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    assert border.read_json(tmp_path / "link.json", SHAPE)["note"] == "x"


@pytest.mark.parametrize(
    "value, said",
    [
        ({"a": [3, 3]}, "a: is not rising at 3"),
        ({"a": [1, True]}, "a[1]: is true, wanted a whole number from 0 to 9"),
        ({"a": [1, 2.0]}, "a[1]: is 2.0, wanted a whole number from 0 to 9"),
        ({"a": [10**30]}, "a[0]: is 1000000000000000000000000000000, wanted"),
        ({"a": "1"}, "a: is '1', wanted a list"),
        ({"a": []}, ""),
        ({}, "f.json has no 'a'; do this"),
        ([], "f.json is a list of 0, wanted an object"),
        ({"a": [], "note": "123456"}, "note: has 6 characters, wanted 5 at most"),
        ({"a": ["\x1b[31m"]}, r"a[0]: is '\x1b[31m', wanted"),
        ({"a": [{"b": 1}]}, "a[0]: is an object of 1, wanted"),
    ],
)
def test_the_message_names_the_place(tmp_path, value, said):
    path = write(tmp_path / "f.json", value)
    if said:
        assert said in refused(border.read_json, path, SHAPE, "do this")
    else:
        border.read_json(path, SHAPE)


@pytest.mark.parametrize(
    "content, said",
    [
        ("[" * 100_000, "deeper than 40 levels"),
        ("[" * 50 + "]" * 50, "deeper than 40 levels"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("{", "cannot be read as JSON"),
        ("1" * 5_000, "cannot be read as JSON"),
    ],
)
def test_json_that_no_program_writes(tmp_path, content, said):
    assert said in refused(border.read_json, write(tmp_path / "f.json", content))


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [*a]",  # an alias inside itself
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "\n".join(f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join(['*' + chr(97 + k)] * 10)}]" for k in range(9)),
        "[" * 2_000 + "]" * 2_000,
        "!!map [1, 2]",
        "!!python/object/apply:os.system [true]",
        "a: 2001-99-99",
        "a: 1\na: 2",
        "a: [1",
        "{? [1]: 2}",
        "0: 1",
        "a: [{~: 1}]",
    ],
    ids=["self", "bomb", "deep", "tag", "code", "month", "twice", "open", "key", "number as key", "null as key"],
)
def test_yaml_that_no_program_writes(tmp_path, content):
    said = refused(border.read_yaml, write(tmp_path / "f.yaml", content), "mend it")
    assert "f.yaml" in said and len(said) < 500


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "loop", "absent", "null byte", "long name"])
def test_what_is_no_file(tmp_path, monkeypatch, kind):
    path = tmp_path / "f.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket is short
        socket.socket(socket.AF_UNIX).bind("f.json")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    path = {"null byte": tmp_path / "a\0b", "long name": tmp_path / ("x" * 5_000)}.get(kind, path)
    said = refused(border.read_json, path)
    wanted = {"folder": "is a folder", "absent": "not found", "null byte": "null byte"}
    assert wanted.get(kind, "cannot be read" if kind in ("loop", "long name") else "a pipe, socket or device") in said


def test_sizes_are_limited(tmp_path):
    path = tmp_path / "f.json"
    with open(path, "wb") as file:
        file.truncate(border.TEXT + 1)  # takes no room on disk
    assert f"has {border.TEXT + 1} bytes" in refused(border.read_json, path)


def test_lines_leave_out_the_one_being_written(tmp_path):
    path = write(tmp_path / "m.jsonl", '{"step": 1}\n{"step": 2, "text": "a\u2028b"}\n{"st')
    assert [line["step"] for line in border.read_lines(path)] == [1, 2]
    assert "m.jsonl, line 2: step: is -1" in refused(
        lambda: list(border.read_lines(write(path, '{"step": 1}\n{"step": -1}\n'), record({"step": whole()})))
    )


def test_pictures_are_of_four_formats(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        Image.new("RGB", (5, 3), (200, 0, 0)).save(tmp_path / name)
        assert border.picture(tmp_path / name).size == (5, 3)
    (tmp_path / "b.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would start Ghostscript
    Image.new("RGB", (5, 3)).save(tmp_path / "c.tiff")
    (tmp_path / "c.tiff").rename(tmp_path / "c.png")
    for name in ("b.png", "c.png"):
        assert f"{name}: is no picture" in refused(border.picture, tmp_path / name)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (5, 3)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    said = refused(border.picture, tmp_path / "a.png")
    assert "50000 x 50000" in said or "exceeds limit" in said


def called(tree: ast.AST) -> set[str]:
    """Names of the reading calls in a module."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, owner = node.func, ""
        if isinstance(name, ast.Attribute):
            owner, name = name.value.id if isinstance(name.value, ast.Name) else "?", name.attr
            known = name in ("read_text", "read_bytes") or (owner in OTHERS and name in READS)
        else:
            name = getattr(name, "id", "")
            known = name in READS - {"load", "loads", "read_text"}  # border's own functions have these names
        if known:
            found.add(name)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_other_module_opens_files(path):
    name = str(path.relative_to(PACKAGE))
    if not name.startswith("files/") and name != "atomic.py":
        assert called(ast.parse(path.read_text())) <= ALLOWED.get(name, set())


def test_the_guard_sees_the_calls():
    text = "json.load(f); path.read_text(); open(p); yaml.safe_load(x); Image.open(p); torch.load(p); read_text(p)"
    assert called(ast.parse(text)) == {"load", "read_text", "open", "safe_load"}
