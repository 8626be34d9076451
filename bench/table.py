"""`python bench/table.py FOLDER`: pytest-benchmark's records as one table and bench/results/<gpu>.json."""

import json
import sys
from pathlib import Path

import torch

COLUMNS = ("GB/s", "of_copy", "TFLOP/s", "goal_us")


def rows(folder: Path) -> list[dict]:
    """One per contender; a file that a bench did not finish is empty."""
    texts = [file.read_text() for file in sorted(folder.glob("*.json"))]
    found = [b for text in texts if text for b in json.loads(text)["benchmarks"]]
    return [{"group": b["group"], **{k: _short(v) for k, v in b["extra_info"].items()}} for b in found]


def _short(value):
    return round(value, 3) if isinstance(value, float) else value


def main(folder: Path, results: Path = Path(__file__).parent / "results") -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    table = rows(folder)
    for row in table:
        more = "  ".join(f"{row[name]:.6g} {name}" for name in COLUMNS if name in row)
        print(f"{row['group']:<60} {row['contender']:<28} {row['us']:11.1f} us  {more}")
    if not torch.cuda.is_available():
        return print("no GPU: nothing is kept")
    results.mkdir(exist_ok=True)
    out = results / f"{gpu.replace(' ', '-').lower()}.json"
    part = out.with_suffix(".part")
    machine = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
    part.write_text(json.dumps({"machine": machine, "rows": table}, indent=1) + "\n")
    part.rename(out)
    print("written to", out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
