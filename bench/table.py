"""`python bench/table.py RUN..`: print the rows of one run, or those of several runs side by side.

A run is a folder that bench/gpu.sh left. Several runs have one column of microseconds each, and the last run's time as
a share of the first's.
"""

import json
import sys
from pathlib import Path

import rows


def title(run: Path) -> str:
    """The GPU, date and commit of a run, from its machine.json."""
    try:
        found = json.loads((run / "machine.json").read_text())
    except (OSError, json.JSONDecodeError):
        return run.name
    gpu = (found["torch"].get("gpu") or {}).get("name", "a CPU: these are no measurements of kernels")
    version = found["torch"].get("version")
    return f"{gpu}, {found['date']}, commit {found['commit'] or 'unknown'}, sources {found['sources']}, torch {version}"


def show(runs: list[Path]) -> None:
    measured = [[row for row in rows.read(run) if row["outcome"] == "measured"] for run in runs]
    for number, run in enumerate(runs):
        print(f"[{number + 1}] {title(run)}" if len(runs) > 1 else title(run))
    if len(runs) == 1:
        print("\n".join(rows.lines(measured[0])))
        return
    times = [{(row["group"], row["contender"]): row["us"] for row in found if "us" in row} for found in measured]
    for key in dict.fromkeys(key for found in times for key in found):
        each = [found.get(key) for found in times]
        cells = "".join(f"{'-' if t is None else f'{t:.1f}':>12}" for t in each)
        ratio = f"{each[-1] / each[0]:8.3f}" if each[0] and each[-1] else ""
        print(f"{key[0]:<60} {key[1]:<28}{cells} us {ratio}")


if __name__ == "__main__":
    show([Path(word) for word in sys.argv[1:]])
