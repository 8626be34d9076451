"""How many hostile inputs a run of the tests has tried, by class.

FLG_FAULTS_OUT=FILE pytest ... writes the counts into FILE, in one process (without xdist). bench/results/faults.json
holds those of one run.
"""

import os
from collections import Counter
from pathlib import Path

from helpers import measured_with

from fastlightgen.atomic import write_json

TRIED: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()


def count(kind: str, refused: bool) -> None:
    """Note one input that was survived: refused in one line, or read. A failure ends its test before this."""
    TRIED[kind] += 1
    REFUSED[kind] += refused


def written(command: str, failures: int) -> None:
    """Write the counts of this process, if they are asked for."""
    if not (file := os.environ.get("FLG_FAULTS_OUT")):
        return
    classes = {kind: {"tried": n, "refused": REFUSED[kind], "read": n - REFUSED[kind]} for kind, n in TRIED.items()}
    record = {
        "command": command,
        "tried": TRIED.total(),
        "failures": failures,
        "classes": dict(sorted(classes.items())),
    }
    write_json(Path(file), record | {"measured with": measured_with()})
