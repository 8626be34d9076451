"""The files of results: one JSON object per line, one line per bench, written as soon as the bench has ended."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

COLUMNS = ("us_low", "us_high", "host_us", "GB/s", "of_copy", "TFLOP/s", "goal_us", "GB", "planned_GB", "loss")


def append(file: Path, row: dict) -> None:
    """Append a row, in one write, and wait for the disk; a full disk costs the file, not the measurement."""
    line = json.dumps({k: _short(v) for k, v in row.items()}) + "\n"
    try:
        with open(file, "a+b", buffering=0) as out:
            if out.tell():  # a line that was cut short must not swallow this one
                out.seek(-1, os.SEEK_END)
                line = line if out.read() == b"\n" else "\n" + line
            out.write(line.encode())
            os.fsync(out.fileno())
    except OSError as error:
        print(f"{file}: {error.strerror}; the row: {line}", end="", file=sys.__stdout__, flush=True)


def _short(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read(folder: Path) -> list[dict]:
    """All rows of a run; a line that was cut short is left out."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{file}: left out a line that was cut short: {line[:60]}")
    return found


def sentence(error: BaseException) -> str:
    """The first line of an error, without the name of an exception that only skips."""
    first = str(error).partition("\n")[0][:300]
    return first if type(error).__name__ == "Skipped" else f"{type(error).__name__}: {first}"


def lines(measured: Iterable[dict]) -> list[str]:
    """A table of rows: microseconds, and the columns that a row has."""
    out = []
    for row in measured:
        more = "  ".join(f"{row[name]:.6g} {name}" for name in COLUMNS if row.get(name) is not None)
        mark = "  (waits for the GPU: host time included)" if row.get("waits") else ""
        time = f"{row['us']:11.1f} us" if "us" in row else ""
        out.append(f"{row['group'] or '':<60} {row['contender']:<28} {time}  {more}{mark}")
    return out
