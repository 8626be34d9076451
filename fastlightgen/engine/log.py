"""The log of a run: files of JSON lines, and the writers that get a copy of every record."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastlightgen.atomic import naming, write_text
from fastlightgen.engine.writers import Writer
from fastlightgen.files.border import parsed, read_lines, read_text
from fastlightgen.files.kinds import LOGGED
from fastlightgen.parallel.log import say


class Lines:
    """A file with one JSON object per line. Resuming at step `start` drops later lines, so that no step repeats."""

    def __init__(self, path: Path, start: int):
        self.path, kept = path, []
        if not path.exists():
            return
        for line in read_text(path).split("\n")[:-1]:  # a crash may have cut the last line short
            try:
                if parsed(line, LOGGED, str(path), "")["step"] <= start:
                    kept.append(line + "\n")
            except ValueError:
                say(f"warning: {path}: a line is damaged and left out: {line[:60]!r}")
        write_text(path, "".join(kept))

    def write(self, record: dict) -> None:
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


class Metrics:
    """Appends a record to metrics.jsonl, samples.jsonl (the look of clips) or choices.jsonl (see `choice`).

    The writers get every record too.
    """

    def __init__(self, folder: Path, start: int, writers: Sequence[Writer] = ()):
        self.files = {name: Lines(folder / f"{name}.jsonl", start) for name in ("metrics", "samples", "choices")}
        self.writers = writers

    def write(self, record: dict, file: str = "metrics") -> None:
        self.files[file].write(record)
        for writer in self.writers:
            writer.write(record)

    def clips(self, step: int, file: Path) -> None:
        """Give the clips of a step to the writers; the disk may have been full."""
        for writer in self.writers if file.is_file() else ():
            writer.clips(step, file)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def read_metrics(path: Path) -> list[dict]:
    """Read all records of a log file; [] if it does not exist."""
    return list(read_lines(path, LOGGED)) if path.exists() else []
