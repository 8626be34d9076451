"""bench/gpu.sh on a CPU: rehearsals, and rehearsals that are killed.

`python tests/bench/rehearsal.py 60 30 FILE.json` kills 60 at random moments of their first 30 seconds, and writes
what each one kept.
ncu and compute-sanitizer are stand-ins that run the command which they are given.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastlightgen.atomic import write_json
from fastlightgen.engine.folder import commit

ROOT = Path(__file__).parents[2]
TOOLS = ("ncu", "compute-sanitizer")
STAND_IN = f"""#!/bin/bash
while [[ $1 != {sys.executable} ]]; do shift; done
exec "$@"
"""
ALL = "tests,kernels,blocks,steps,ncu,sanitizer"
FAST = "not compile and not overhead and not capture and not hunyuan"


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Variables of a rehearsal whose results go to folder/out."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name in TOOLS:
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    own = {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OUT": str(folder / "out"),
        "FLG_BENCH_SIMT": "1",
        "OMP_NUM_THREADS": "1",
        "CASES": FAST,
    }
    return os.environ | own | more


def rehearse(folder: Path, **more: str) -> subprocess.CompletedProcess:
    command = [ROOT / "bench" / "gpu.sh"]
    return subprocess.run(command, env=environment(folder, **more), capture_output=True, text=True)


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "out").iterdir())


def lines(run: Path) -> list[dict]:
    """Every line of results; each must be whole."""
    return [json.loads(line) for file in sorted(run.glob("*.jsonl")) for line in file.read_text().splitlines()]


def ended(run: Path) -> set[str]:
    """The benches that ended, by pytest's own output."""
    return set(re.findall(r"^(\S+::.+\]) (?:PASSED|FAILED|SKIPPED)", (run / "run.log").read_text(), re.M))


def begun(run: Path) -> set[str]:
    return set(re.findall(r"^(bench/\S+::.+\]) ", (run / "run.log").read_text(), re.M))


def has_begun(folder: Path, benches: int) -> bool:
    logs = list((folder / "out").glob("*/run.log"))
    return bool(logs) and len(begun(logs[0].parent)) >= benches


def kill(folder: Path, seconds: float, benches: int = 0, **more: str) -> tuple[int, int] | None:
    """Kill a rehearsal with all its processes after `seconds`. Check that it lost nothing but the running bench.

    With `benches`, kill it as soon as so many have begun. Return how many benches it has, and how many had begun; None
    if it was already over.
    """
    process = subprocess.Popen(
        [ROOT / "bench" / "gpu.sh"], env=environment(folder, **more), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (benches and has_begun(folder, benches)):
        if process.poll() is not None:
            return None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = runs(folder)[-1:] if (folder / "out").exists() else []
    if not found or not (found[0] / "run.log").exists():
        return 0, 0  # killed before there was a folder
    run = found[0]
    if (run / "machine.json").exists():
        json.loads((run / "machine.json").read_text())
    cases = [line["case"] for line in lines(run)]
    assert len(cases) == len(set(cases)), f"{run}: a bench has two lines"
    lost = ended(run) - set(cases)
    assert not lost, f"{run}: lost {lost}"
    assert len(begun(run) - set(cases)) <= 1, f"{run}: lost {begun(run) - set(cases)}"
    for name in re.findall(r"\((\S+\.(?:log|jsonl))\)$", (run / "run.log").read_text(), re.M):  # parts that were over
        assert (run / name).exists(), f"{run}: {name} is missing"
    return len(cases), len(begun(run))


def main(times: int, longest: float, out: str = "") -> None:
    killed: list[dict] = []
    while len(killed) < times:
        with tempfile.TemporaryDirectory() as folder:
            seconds = random.uniform(0.5, longest)
            kept = kill(Path(folder), seconds, PARTS=ALL, TESTS="tests/ops/test_dmd_gradient.py")
            if kept:
                killed.append({"seconds": round(seconds, 1), "kept": kept[0], "begun": kept[1]})
            said = f"{kept[0]} benches have their line, {kept[1]} had begun" if kept else "it was over before"
            print(f"{len(killed)} of {times}, at {seconds:.1f} s: {said}", flush=True)
    if out:
        command = f"python tests/bench/rehearsal.py {times} {longest:g} {out}"
        lost = max(each["begun"] - each["kept"] for each in killed)
        made = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
        write_json(Path(out), {"command": command, **made, "most benches lost": lost, "killed": killed})


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])
