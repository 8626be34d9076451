"""The lines of results: nothing that was written is lost by what comes after it."""

import json
import subprocess
import sys
from pathlib import Path

import rows
import table
from helpers import without_flags

ROOT = Path(__file__).parents[2]


def test_a_line_that_was_cut_short_costs_only_itself(tmp_path: Path, capsys):
    file = tmp_path / "kernels.jsonl"
    rows.append(file, {"case": "a", "us": 1.23456789})
    with open(file, "a") as out:
        out.write('{"case": "b", "us"')
    rows.append(file, {"case": "c"})
    assert rows.read(tmp_path) == [{"case": "a", "us": 1.23457}, {"case": "c"}]
    assert "cut short" in capsys.readouterr().out


def test_a_full_disk_sends_the_row_to_the_output():
    code = "import rows; from pathlib import Path; rows.append(Path('/dev/full'), {'case': 'a', 'us': 1.0})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == '/dev/full: No space left on device; the row: {"case": "a", "us": 1.0}\n'


def test_pytest_benchmark_gets_the_samples(tmp_path: Path):
    """Its median is the row's, for the copy, whose samples were taken earlier, and for an attention kernel."""
    files = [ROOT / "bench" / f"bench_{name}.py" for name in ("attention", "dmd_gradient")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *files,
        "-k",
        "math or copy or cuda",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--benchmark-json={tmp_path / 'out.json'}"]
    env = without_flags() | {"PYTHONPATH": str(ROOT), "FLG_BENCH_OUT": str(tmp_path)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    written = {row["case"]: row for row in rows.read(tmp_path) if row["outcome"] == "measured"}
    assert len(found) == len(written) == 3
    for bench in found:
        row = written[bench["fullname"]]
        assert bench["stats"]["rounds"] == row["rounds"]
        assert abs(bench["stats"]["median"] * 1e6 / row["us"] - 1) < 1e-4  # rows have six digits
    # The seconds per product of a CPU: 4 x 96^2 x 2 x 128 operations take microseconds, a call of nothing does not.
    assert all(written[case]["us"] > 5 for case in written if "attention" in case)
    assert "on a CPU, which says nothing about a GPU's speed" in done.stdout
    assert "no CUDA device is visible" in done.stdout  # the reason of the skipped row


def test_runs_are_compared_row_by_row(tmp_path: Path, capsys):
    """Microseconds of each run, and the last one as a share of the first; a row of one run alone stays."""
    machine = {"date": "2026-11-26", "commit": "5d8cb3f", "sources": "501c6e8bab69"}
    machine |= {"torch": {"version": "2.11.0+cu130", "gpu": {"name": "NVIDIA H100"}}}
    times = {"old": {"cuda": 200.0, "eager": 900.0}, "new": {"cuda": 150.0, "triton": 170.0}}
    for run, found in times.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "machine.json").write_text(json.dumps(machine))
        for name, us in found.items():
            row = {"case": name, "outcome": "measured", "group": "norm", "contender": name, "us": us}
            rows.append(tmp_path / run / "kernels.jsonl", row)
    table.show([tmp_path / "old", tmp_path / "new"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "[1] NVIDIA H100, 2026-11-26, commit 5d8cb3f, sources 501c6e8bab69, torch 2.11.0+cu130"
    assert [line.split() for line in said[2:]] == [
        ["norm", "cuda", "200.0", "150.0", "us", "0.750"],
        ["norm", "eager", "900.0", "-", "us"],
        ["norm", "triton", "-", "170.0", "us"],
    ]
