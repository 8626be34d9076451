"""Opens files from outside. Everything that reads a file goes through here.

A file must be regular (no pipe, socket or device) and have a sensible size. JSON and YAML must also have a sensible
depth, and then the shape that their kind of file declares (kinds.py). What is wrong is a ValueError of one line that
names the file, the key, what was found, what was wanted and what to do. `regular` and `opened` raise OSError where the
system refuses, as `open` does.
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from fastlightgen.files.schema import Shape, shown

TEXT = 64 << 20  # bytes of a text file
PICTURES = ("PNG", "JPEG", "WEBP", "BMP")
PIXELS = 100_000_000
DEPTH = 40  # of objects and lists within each other
NODES = 1_000_000  # values of a YAML file, each use of an alias counted


def regular(path: str | Path, most: float = math.inf, kind: str = "file") -> Path:
    """Return the path of a regular file of at most `most` bytes. Links are followed."""
    try:
        found = os.stat(path)
    except ValueError as err:  # a null byte in the name
        raise ValueError(f"{shown(str(path))}: is no file name ({err})") from None
    _check_kind(path, found, most, kind)
    return Path(path)


def _check_kind(path: str | Path, found: os.stat_result, most: float, kind: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(21, "is a folder, wanted a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: is a pipe, socket or device, wanted a regular {kind}")
    if found.st_size > most:
        raise ValueError(f"{path}: has {found.st_size} bytes, wanted a {kind} of {most} at most")


def opened(path: str | Path, most: float = math.inf) -> IO[bytes]:
    """Open a regular file to read its bytes; a pipe in its place does not block."""
    regular(path, most)  # a socket cannot be opened at all
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_kind(path, os.fstat(handle), most, "file")  # once more: it may have been replaced meanwhile
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: str | Path, most: int = TEXT, errors: str = "strict") -> str:
    """Read a text file in UTF-8, with or without a byte order mark."""
    try:
        with opened(path, most) as file:
            content = file.read(most + 1)
        return content.decode("utf-8-sig", errors)
    except OSError as err:
        raise ValueError(f"{path}: {unread(err)}") from None
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: is not UTF-8 text (byte {err.start})") from None


def unread(err: OSError) -> str:
    """Why a file was not read."""
    if isinstance(err, FileNotFoundError):
        return "not found"
    return f"cannot be read ({err.strerror or err})"


def read_json(path: str | Path, shape: Shape | None = None, remedy: str = "make it again") -> Any:
    """Read a JSON file and check its shape."""
    try:
        content = read_text(path)
    except ValueError as err:
        raise ValueError(f"{err}; {remedy}") from None
    return parsed(content, shape, str(path), remedy)


def read_lines(path: str | Path, shape: Shape | None = None, remedy: str = "delete that line") -> Iterator[Any]:
    """Yield the values of a file of JSON lines. A last line without an end is still being written and left out."""
    for number, line in enumerate(read_text(path).split("\n")[:-1], 1):
        yield parsed(line, shape, f"{path}, line {number}", remedy)


def parsed(content: str, shape: Shape | None, where: str, remedy: str) -> Any:
    """Parse JSON. Keys that occur twice and values nested too deep are refused."""
    try:
        value = json.loads(content, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(f"{where}: is nested deeper than {DEPTH} levels; {remedy}") from None
    except ValueError as err:
        raise ValueError(f"{where}: cannot be read as JSON ({shorter(err)}); {remedy}") from None
    check_depth(value, where, remedy)
    check(value, shape, where, remedy)
    return value


def check(value: Any, shape: Shape | None, where: str, remedy: str) -> None:
    """Raise a one-line ValueError if a value has another shape."""
    if shape and (found := shape(value)):
        said = f"{where}: {found}" if not found.startswith(("is ", "has ")) else f"{where} {found}"
        raise ValueError(f"{said}; {remedy}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(k for k in names if names.count(k) > 1))} occurs twice")
    return out


def check_depth(value: Any, where: str, remedy: str) -> None:
    """Raise if objects and lists are nested deeper than DEPTH, or hold more than NODES values.

    Each use of a YAML alias counts: a few lines of aliases can stand for billions of values.
    """
    level, count = [value], 0
    for _ in range(DEPTH + 1):
        count += len(level)
        if count > NODES:
            raise ValueError(f"{where}: holds more than {NODES} values; {remedy}")
        level = [v for c in level if isinstance(c, dict | list) for v in (c.values() if isinstance(c, dict) else c)]
        if not level:
            return
    raise ValueError(f"{where}: is nested deeper than {DEPTH} levels; {remedy}")


def picture(path: str | Path) -> Any:
    """Open a picture as RGB: PNG, JPEG, WebP or BMP, of at most PIXELS pixels. Other formats may start programs."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(regular(path, kind="picture"), formats=PICTURES) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{path}: has {image.width} x {image.height} pixels, wanted {PIXELS} at most")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is no picture; wanted {', '.join(PICTURES)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as err:
        raise ValueError(f"{path}: cannot be read as a picture ({shorter(err)})") from None


class Loader(yaml.SafeLoader):
    """YAML of plain values, in which a key may occur once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            key, times = max(keys.items(), key=lambda c: c[1], default=("", 0))
            if times > 1:
                said = f"{key} is given {times} times: keep one"
                raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
        return super().construct_mapping(node, deep)


def parsed_yaml(content: str, where: str, remedy: str = "mend it") -> Any:
    """Parse YAML of plain values."""
    try:
        value = yaml.load(content, Loader)
    except yaml.YAMLError as err:
        mark, problem = getattr(err, "problem_mark", None), getattr(err, "problem", None) or err
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}: is not valid YAML: {place}{shorter(problem)}; {remedy}") from None
    except (ValueError, TypeError, OverflowError, RecursionError, AttributeError) as err:  # a tag, a date, a depth
        raise ValueError(f"{where}: cannot be read as YAML ({shorter(err)}); {remedy}") from None
    check_depth(value, where, remedy)
    return value


def read_yaml(path: str | Path, remedy: str = "mend it") -> Any:
    """Read a YAML file of plain values, whose keys are text."""
    value = parsed_yaml(read_text(path, 4 << 20), str(path), remedy)
    for key in odd_keys(value):
        raise ValueError(f"{path}: has the key {shown(key)}, wanted text; put it in quotes")
    return value


def odd_keys(value: Any) -> Iterator[Any]:
    """Keys that are no text, at any depth."""
    if isinstance(value, dict):
        yield from (key for key in value if not isinstance(key, str))
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from odd_keys(part)


def shorter(err: object) -> str:
    """A library's message on one line of at most 200 characters."""
    said = " ".join(str(err).split()) or type(err).__name__
    return said if len(said) <= 200 else f"{said[:197]}..."
