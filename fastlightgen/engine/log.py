"""Progress on screen and metrics.jsonl."""

import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from fastlightgen.engine import ranks


def bar(total: int, title: str, shown: bool, start: int = 0) -> tqdm:
    """A progress bar with ETA; on a terminal it moves twice a second, in a log file four times a minute."""
    every = 0.5 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=total,
        initial=start,
        desc=title,
        disable=not shown or ranks.rank() > 0,
        mininterval=every,
        dynamic_ncols=True,
    )


def say(text: str) -> None:
    """A line for the user that leaves a progress bar whole; of several processes the first one speaks."""
    if ranks.rank() == 0:
        tqdm.write(text)


class Metrics:
    """One JSON object a line. Resuming at a step drops the lines after it, so that none appears twice."""

    def __init__(self, path: Path, start: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    break  # a line cut short by a crash is the last one
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
        self.file = open(path, "a", buffering=1)

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
