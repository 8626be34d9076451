"""`python bench/table.py FILE`: print the rows of FLG_BENCH_ROWS as one table, and write bench/results/<gpu>.json."""

import json
import sys
from pathlib import Path

import torch

COLUMNS = ("GB/s", "of_copy", "TFLOP/s", "goal_us")


def rows(file: Path) -> list[dict]:
    """One row per contender; skip a line that was cut short."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append({k: _short(v) for k, v in json.loads(line).items()})
        except json.JSONDecodeError:
            print("left out:", line[:80])
    return found


def _short(value):
    return round(value, 3) if isinstance(value, float) else value


def main(file: Path, results: Path = Path(__file__).parent / "results") -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    table = rows(file)
    for row in table:
        more = "  ".join(f"{row[name]:.6g} {name}" for name in COLUMNS if name in row)
        print(f"{row['group']:<60} {row['contender']:<28} {row['us']:11.1f} us  {more}")
    if not torch.cuda.is_available() or not table:
        return print("no GPU: nothing is kept" if table else "no row: nothing is kept")
    results.mkdir(exist_ok=True)
    out = results / f"{gpu.replace(' ', '-').lower()}.json"
    part = out.with_suffix(".part")
    machine = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
    part.write_text(json.dumps({"machine": machine, "rows": table}, indent=1) + "\n")
    part.rename(out)
    print("written to", out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
