"""The log of a run on disk: JSON lines, and the writers beside them."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastlightgen.atomic import write_text
from fastlightgen.engine.writers import Writer


class Lines:
    """A file of JSON objects, one a line. Resuming at a step drops the lines after it, so that none appears twice."""

    def __init__(self, path: Path, start: int):
        self.path, kept = path, []
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= start:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                break  # a line cut short by a crash is the last one
        write_text(path, "".join(kept))

    def write(self, record: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


class Metrics:
    """Fans a record out: a line of metrics.jsonl, or of samples.jsonl for the look of clips, and the writers."""

    def __init__(self, folder: Path, start: int, writers: Sequence[Writer] = ()):
        self.files = {name: Lines(folder / f"{name}.jsonl", start) for name in ("metrics", "samples")}
        self.writers = writers

    def write(self, record: dict, file: str = "metrics") -> None:
        self.files[file].write(record)
        for writer in self.writers:
            writer.write(record)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
