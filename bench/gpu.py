"""Builds, tests and measures on a GPU machine; `bench/gpu.sh` starts it and lists the variables that it reads.

Every part has a limit of time and writes its own file into a new folder DATE-GPU-COMMIT of OUT, line by line, so that a
run that is cut at any second leaves what it had:

    machine.json    GPU, driver, clocks, versions, commit, registers of the compiled kernels
    run.log         what this program prints, the build's output, that of the bench processes
    tests.log       the operators' tests on the GPU, with the reasons of those that were skipped
    kernels.jsonl, blocks.jsonl, steps.jsonl    one line per bench
    ncu.log, sanitizer.log                      a profile of each operator; a check of memory and of races

One process runs all benches, in the order of order.py. After a crash a second one goes on with the next bench.
Without a GPU this is a rehearsal: nothing is built, shapes are small.
"""

import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import machine
import rows
from order import BROKEN_GPU, OPERATORS, PARTS
from run import Run, folder_for
from table import show

ROOT, PY = machine.ROOT, sys.executable
WORDS = ("tests", *PARTS, "ncu", "sanitizer")
FIRST = "tests,kernels,blocks,ncu"  # the parts of a first run; a second one takes the others
RESERVED = {"ncu": 60, "sanitizer": 100}  # seconds that the benches leave to the parts after them
LONGEST = os.environ.get("FLG_BENCH_LONGEST", "90")  # seconds of one bench, compilation included
SITE, STAMP = ROOT / "build" / "bench-site", ROOT / "build" / "bench-stamp"


def install(run: Run) -> None:
    """Install the carried wheels into a folder of their own, which PYTHONPATH names already."""
    wheels = sorted((ROOT / "bench" / "wheels").glob("*.whl"))
    if machine.number(machine.version("setuptools")) >= (77,):
        wheels = [w for w in wheels if not w.name.startswith("setuptools-")]
    names = "\n".join(w.name for w in wheels)
    stamp = SITE / "wheels.txt"
    if not wheels or (stamp.exists() and stamp.read_text() == names):
        return
    flags = "--no-index --no-deps --no-compile --no-cache-dir --upgrade --disable-pip-version-check -q".split()
    command = [PY, "-m", "pip", "install", *flags, "--target", SITE, *wheels]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return run.say(f"the wheels of bench/wheels were not installed: {reason}", bad=True)
    stamp.write_text(names)
    importlib.invalidate_caches()  # the folder was not there when this process began
    run.say(f"installed {len(wheels)} wheels into {SITE.relative_to(ROOT)}")


def build(run: Run, found: dict) -> None:
    """Build the compiled module, unless it was built from the same sources for the same GPU."""
    gpu = found["torch"]["gpu"]
    if gpu is None or found["nvcc"] is None:
        return
    arch = "90a" if gpu["capability"] == [9, 0] else "".join(map(str, gpu["capability"]))
    env = {"FLG_BUILD_CUDA": "1", "FLG_CUDA_ARCHS": arch, "FLG_CUTLASS": found["cutlass"] or ""}
    module = ROOT / "fastlightgen" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    key = hashlib.sha256(json.dumps([env, found["nvcc"], found["python"], compiled_from()]).encode()).hexdigest()
    if module.exists() and os.environ.get("BUILT"):
        run.say("build: the compiled module came along")
    elif module.exists() and STAMP.exists() and STAMP.read_text() == key:
        run.say("build: the compiled module is up to date")
    else:
        began = time.monotonic()
        code = run.call([PY, "setup.py", "-q", "build_ext", "--inplace"], "run.log", 240, **env)
        if code:
            reason = "out of time" if code == 124 else run.last("run.log")
            return run.say(f"build: {reason}; the rows of Triton and torch remain", bad=True)
        STAMP.parent.mkdir(exist_ok=True)
        STAMP.write_text(key)
        run.say(f"build: {time.monotonic() - began:.0f} s for sm_{arch}")
    found["kernels"] = machine.registers(module)


def compiled_from() -> str:
    files = [p for folder in ("csrc", "bindings") for p in sorted((ROOT / folder).rglob("*.*")) if p.is_file()]
    return hashlib.sha256(b"".join(p.read_bytes() for p in [*files, ROOT / "CMakeLists.txt"])).hexdigest()


def tests(run: Run, found: dict) -> None:
    command = [PY, "-m", "pytest", "-q", "-rfs", "--tb=short"]
    command += ["-m", "not slow", "-k", "gpu or GPU", "-o", "addopts=", "-p", "no:cacheprovider"]
    if found["packages"]["pytest-xdist"]:
        command += ["-n", min(8, os.cpu_count() or 1)]
    command += os.environ.get("TESTS", "tests/ops").split()
    code = run.call(command, "tests.log", 150, OMP_NUM_THREADS="1")
    said = "out of time" if code == 124 else run.last("tests.log").strip("= ")
    run.say(f"tests: {said} (tests.log)", bad=code not in (0, 5))


def benches(run: Run, parts: list[str]) -> None:
    """Run the benches of some parts in one process; after a crash go on in another, behind the bench that crashed."""
    chosen = [part for part in parts if part in PARTS]
    for part in chosen:
        run.write(f"{part}.jsonl", "")
    later = sum(seconds for part, seconds in RESERVED.items() if part in parts)
    command = [PY, "-m", "pytest", *(f"bench/bench_{f}.py" for part in chosen for f in PARTS[part])]
    command += "-v -rs --tb=short --capture=sys --continue-on-collection-errors".split()
    command += ["--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-k", os.environ["CASES"]] if os.environ.get("CASES") else []
    for _ in range(8):
        with tempfile.TemporaryDirectory() as folder:
            running, limit = Path(folder, "running"), run.left() - later - 10
            env = {"FLG_BENCH_OUT": str(run.folder), "FLG_BENCH_RUNNING": str(running), "FLG_BENCH_LONGEST": LONGEST}
            code = run.call(command, "run.log", limit + 10, FLG_BENCH_CAP=str(max(limit, 0)), **env)
            part, _, case = running.read_text().partition(" ") if running.exists() else ("", "", "")
        # The watchdog of conftest.py ends a process with 1 in the middle of a bench, pytest only after its last one.
        hung = f"it took longer than {LONGEST} s" if code == 1 else f"the process ended with {ending(code)}"
        reason = "it was out of time" if code == 124 else hung
        if case and case not in {row["case"] for row in rows.read(run.folder)}:
            rows.append(run.folder / f"{part}.jsonl", {"case": case, "outcome": "failed", "reason": reason})
        if code == 124 or not (case or code == BROKEN_GPU):  # out of time, or at the end
            break
        run.say(f"{case or 'the GPU is lost'}: {reason}; another process goes on behind it", bad=True)
    measured = rows.read(run.folder)
    for part in chosen:
        how = [row["outcome"] for row in measured if row["case"].startswith(files_of(part))]
        counts = ", ".join(f"{how.count(word)} {word}" for word in ("measured", "skipped", "failed"))
        run.say(f"{part}: {counts} ({part}.jsonl)", bad="failed" in how)
    if code not in (0, 1, 5):
        run.say(f"benches: {'out of time' if code == 124 else f'ended with {ending(code)}, see run.log'}", bad=True)


def ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def files_of(part: str) -> tuple[str, ...]:
    return tuple(f"bench/bench_{f}.py" for f in PARTS[part])


def ncu(run: Run, found: dict) -> None:
    """Profile each operator's kernels in a process of its own, so that each has its text in the log when it ends."""
    if not found["tools"]["ncu"]:
        return left_out(run, "ncu", "ncu is not on PATH")
    sections = [w for s in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
                for w in ("--section", s)]  # fmt: skip
    tool = ["ncu", "--clock-control", "none", "--kernel-name-base", "demangled", "-k", "regex:flg::", *sections]
    codes = {op: run.call([*tool, PY, "bench/once.py", op], "ncu.log", 40) for op in OPERATORS}
    report(run, "ncu", codes)


def sanitizer(run: Run, found: dict) -> None:
    """Check one small case of every kernel: accesses outside of allocations, then races in shared memory."""
    if not found["tools"]["compute-sanitizer"]:
        return left_out(run, "sanitizer", "compute-sanitizer is not on PATH")
    codes = {}
    for tool in ("memcheck", "racecheck"):
        flags = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "50"]
        command = ["compute-sanitizer", *flags, PY, "bench/once.py", *OPERATORS, "small"]
        codes[tool] = run.call(command, "sanitizer.log", 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    report(run, "sanitizer", codes)


def report(run: Run, part: str, codes: dict[str, int]) -> None:
    words = {0: "ok", 124: "out of time"}
    each = ", ".join(f"{name} {words.get(code) or f'ended with {ending(code)}'}" for name, code in codes.items())
    run.say(f"{part}: {each} ({part}.log)", bad=any(codes.values()))


def left_out(run: Run, part: str, reason: str) -> None:
    run.write(f"{part}.log", f"left out: {reason}\n")
    run.say(f"{part}: left out, {reason}")


def main() -> int:
    parts = [part for part in os.environ.get("PARTS", FIRST).replace(",", " ").split()]
    if unknown := [part for part in parts if part not in WORDS]:
        print(f"PARTS: got {unknown[0]!r}, wanted some of {','.join(WORDS)}")
        return 2
    run = Run(float(os.environ.get("FLG_GPU_SECONDS", 570)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        install(run)
        found = machine.look()
        run.folder = folder_for(found, Path(os.environ.get("OUT") or ROOT / "bench" / "results"), run)
        run.say(f"results: {run.folder}")
        for line in machine.complaints(found):
            run.say(line)
        note(run, found)
        if "error" in found["torch"]:
            return 1
        build(run, found)
        note(run, found)
        if "tests" in parts and found["packages"]["pytest"]:
            tests(run, found)
        if set(parts) & set(PARTS) and found["packages"]["pytest"] and found["packages"]["pytest-benchmark"]:
            benches(run, parts)
        if "ncu" in parts:
            ncu(run, found)
        if "sanitizer" in parts:
            sanitizer(run, found)
        return int(run.failed)
    finally:
        run.stop()
        if run.folder:
            show([run.folder])
            print(f"{os.environ.get('FLG_GPU_SECONDS', 570)} seconds given, {run.left():.0f} left; {run.folder}")


def note(run: Run, found: dict) -> None:
    """Write machine.json, in one piece."""
    part = run.folder / ".machine.part"
    try:
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(run.folder / "machine.json")
    except OSError as error:
        run.say(f"machine.json: {error.strerror}: {json.dumps(found)}", bad=True)


if __name__ == "__main__":
    sys.exit(main())
