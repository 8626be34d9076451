"""Reads the list of clips to encode: a CSV or JSON-lines file, or a folder of videos with captions beside them.

Columns: file (relative to the list), caption, and optionally start, end (in seconds) and dover (a quality score).
"""

import csv
import io
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastlightgen.files.border import parsed, read_text, regular, unread

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".gif")
LONGEST = 10**8  # seconds
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Row:
    """A clip of the list; `problem` is the reason why it cannot be encoded, or empty."""

    name: str  # as written in the list
    file: Path
    caption: str = ""
    start: float = 0.0
    end: float | None = None
    problem: str = ""


def read_list(videos: str | Path, min_dover: float) -> list[Row]:
    """Read the rows of a .csv or .jsonl file, or of a folder with captions beside the videos (see also `list_in`)."""
    path = Path(videos)
    if path.is_dir():
        rows = folder_rows(path)
        wanted = f"a folder with {', '.join(VIDEOS)} files or folders of pictures, each with a .txt of the same name"
    else:
        if path.suffix not in READERS:
            found = "neither a folder nor" if path.exists() else "there is no such folder; wanted one, or"
            raise ValueError(f"videos={path}: {found} a {' or '.join(READERS)} file")
        try:
            records = READERS[path.suffix](path)
        except ValueError as err:
            raise ValueError(f"videos={str(err).removeprefix('videos=')}") from None
        rows = [list_row(record, path.parent, min_dover) for record in records]
        wanted = "one line per clip below the line of column names" if path.suffix == ".csv" else "one object per line"
    if not rows:
        raise ValueError(f"videos={path}: lists no clips; wanted {wanted}")
    return rows


def list_in(folder: Path) -> Path | None:
    """Return the list of clips that stands in a folder of videos, if there is one.

    Other tables pass, unless no video has a caption beside it: then the mistake in the table is the error to report.
    """
    found, mistakes = [], []
    for path in sorted(p for p in folder.iterdir() if p.suffix in READERS and p.is_file()):
        try:
            READERS[path.suffix](path)
            found.append(path)
        except (OSError, ValueError) as err:  # UnicodeDecodeError is a ValueError
            mistakes.append(err)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"videos={folder}: holds several lists ({names}); give one of them as videos=")
    if not found and mistakes and not any(row.caption for row in folder_rows(folder)):
        raise mistakes[0]
    return found[0] if found else None


def videos_in(videos: str | Path, key: str) -> list[Row]:
    """List the videos of a folder, or of a .csv or .jsonl list, that are measured: those of a folder need no caption.

    `key`: what the user calls them, for messages.
    """
    path = Path(videos)
    if not path.is_dir():
        try:
            return read_list(path, -math.inf)
        except ValueError as err:
            raise ValueError(f"{key}={str(err).removeprefix('videos=')}") from None
    if not (rows := folder_rows(path, captions=False)):
        raise ValueError(f"{key}={videos}: holds no videos; wanted {', '.join(VIDEOS)} files or folders of pictures")
    return rows


def folder_rows(folder: Path, captions: bool = True) -> list[Row]:
    """List the videos and the folders of pictures in a folder, sorted by name; NAME.txt holds the caption."""
    rows = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in VIDEOS if not file.is_dir() else pictures(file):
            text = file.with_suffix(".txt")
            # A caption in another encoding must not stop the list.
            caption = read_text(text, errors="replace").strip() if text.is_file() else ""
            problem = unfit(file) or ("" if caption or not captions else f"no caption: {text.name} is missing or empty")
            rows.append(Row(file.name.encode(errors="replace").decode(), file, caption, problem=problem))
    return rows


def unfit(file: Path) -> str:
    """Why a file or a folder of pictures cannot be a clip; "" if it can."""
    try:
        str(file).encode()
        if file.is_dir():
            return "" if pictures(file) else "a folder without pictures"
        regular(file, kind="video")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    except OSError as err:
        return unread(err)
    except ValueError as err:
        return str(err).removeprefix(f"{file}: ")
    return ""


def pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def csv_records(path: Path) -> list[dict]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        records, names = list(reader), reader.fieldnames or []
    except csv.Error as err:
        raise ValueError(f"videos={path}: line {reader.line_num} is not CSV ({err})") from None
    if absent := [c for c in ("file", "caption") if c not in names]:
        raise ValueError(f"videos={path}: has no column {absent[0]!r}; wanted file, caption [, start, end, dover]")
    return records


def json_records(path: Path) -> list[dict]:
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        record = parsed(line, None, f"videos={path}, line {number}", "mend it")
        if not isinstance(record, dict) or "file" not in record or "caption" not in record:
            raise ValueError(
                f'videos={path}: line {number} is not an object like {{"file": "a.mp4", "caption": "..."}}'
            )
        records.append(record)
    return records


READERS = {".csv": csv_records, ".jsonl": json_records}


def list_row(record: dict, base: Path, min_dover: float) -> Row:
    """Check a record of a list and return it as a Row; a mistake in it becomes the row's `problem`."""
    name, caption = str(record["file"] or "").strip(), str(record["caption"] or "").strip()
    file = base / name
    row = partial(Row, name, file, caption)
    if not name:
        return row(problem="no file is named")
    if not caption:
        return row(problem="no caption")
    numbers = {}
    for key in ("start", "end", "dover"):
        value = record.get(key)
        if value is None or value == "":
            continue
        try:
            numbers[key] = float(value)
        except (TypeError, ValueError):
            return row(problem=f"{key}={value!r} is not a number")
        if not math.isfinite(numbers[key]) or abs(numbers[key]) > LONGEST:
            return row(problem=f"{key}={value!r} is not a finite number of at most {LONGEST:,}")
    start, end = numbers.get("start", 0.0), numbers.get("end")
    problem = ""
    if start < 0 or (end is not None and end <= start):
        problem = f"start={start:g}, end={end}: wanted 0 <= start < end"
    elif numbers.get("dover", min_dover) < min_dover:  # clips without a score pass
        problem = f"dover={numbers['dover']:g} is below min_dover={min_dover:g}"
    else:
        problem = unfit(file)
    return row(start=start, end=end, problem=problem)
