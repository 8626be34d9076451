"""bench/gpu.sh without a GPU: every part writes its file, and a run that is cut or crashes keeps what it had."""

import json
import os
import signal
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import gpu
import machine
import pytest
import rehearsal
import simt
from order import OPERATORS, PARTS
from run import Run, folder_for

ROOT = rehearsal.ROOT
H100 = {
    "torch": {"gpu": {"name": "NVIDIA H100", "capability": [9, 0]}},
    "nvcc": "13.0",
    "cutlass": None,
    "python": "3.12",
}


@pytest.fixture(scope="module", autouse=True)
def shim() -> None:
    """The CUDA sources for the CPU, built once for all tests."""
    if simt.COMPILER is None:
        pytest.skip("g++ is not installed")
    simt.build()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess, Path]:
    """A rehearsal of all parts: what it said, and its folder."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = rehearsal.rehearse(folder, PARTS=rehearsal.ALL, TESTS="-n0 tests/ops/test_dmd_gradient.py")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = rehearsal.runs(folder)
    return done, run


def test_every_part_writes_its_file(whole):
    done, run = whole
    names = {"machine.json", "run.log", "tests.log", "ncu.log", "sanitizer.log", *(f"{part}.jsonl" for part in PARTS)}
    assert {file.name for file in run.iterdir()} == names and len(names) == 8
    assert "no GPU: this is a rehearsal on the CPU" in done.stdout
    for log in ("ncu.log", "sanitizer.log"):
        said = (run / log).read_text()
        assert all(f"{op}: the CUDA sources on the CPU shim; all results are finite" in said for op in OPERATORS)
    assert "no CUDA device" in (run / "tests.log").read_text()  # the reason of the skipped tests


def test_the_machine_is_recorded(whole):
    _, run = whole
    found = json.loads((run / "machine.json").read_text())
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert found["torch"]["version"] and found["packages"]["pytest-benchmark"] and len(found["sources"]) == 12
    if head:
        assert found["commit"].removesuffix("-dirty") == head.strip()
        assert run.name.endswith(f"-cpu-{found['commit']}")


def test_our_rows_are_measured_first(whole):
    """One line per bench, in the order of the plan; the losses of the steps are those of diffusers' networks."""
    _, run = whole
    cases = [line for line in rehearsal.lines(run) if line["outcome"] == "measured"]
    assert len({line["case"] for line in cases}) == len(cases) and not any(
        line["outcome"] == "failed" for line in rehearsal.lines(run)
    )
    order = [line["contender"] for line in map(json.loads, (run / "kernels.jsonl").read_text().splitlines())
             if line["outcome"] == "measured"]  # fmt: skip
    assert order[:3] == ["copy", "product", "nothing"]
    assert order[3:9] == ["copy", "cuda on the CPU shim", "eager"] * 2
    for line in cases:
        assert line["us_low"] <= line["us"] <= line["us_high"] and line["rounds"] >= 2
    losses = {line["case"]: line["loss"] for line in cases if "loss" in line}
    assert len(losses) == 6
    for stage in ("stage II", "stage III"):
        names = ("ours", "diffusers", "diffusers, cuDNN")
        ours, *theirs = (losses[f"bench/bench_steps.py::bench_steps[{stage}-{name}]"] for name in names)
        assert theirs == pytest.approx([ours] * 2, rel=1e-4)


def test_a_kill_loses_only_the_running_bench(tmp_path: Path):
    """Kill when the fourth bench has begun: the three before it have their lines."""
    kept, begun = rehearsal.kill(tmp_path, 900, benches=4, PARTS="kernels")
    assert kept >= 3 and begun >= 4


CRASH = """
import os, signal, time, torch

def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def pytest_runtest_call(item):
    if "copy" in item.name:
        torch.cuda.is_available, torch.cuda.synchronize = lambda: True, lost
        assert False, "wrong numbers"
    if "product" in item.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "nothing" in item.name:
        time.sleep(600)
"""


def test_a_bench_that_crashes_or_hangs_costs_only_itself(tmp_path: Path):
    """A failure after which the GPU does not answer, a crash, a hang: each time a new process goes on behind it."""
    (tmp_path / "crash.py").write_text(CRASH)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "PYTEST_PLUGINS": "crash", "FLG_BENCH_LONGEST": "3", "PARTS": "kernels"}
    done = rehearsal.rehearse(tmp_path, CASES="ceilings or (dmd and eager)", **more)
    assert done.returncode == 1, done.stdout
    (run,) = rehearsal.runs(tmp_path)
    how = {line["case"].partition("[")[2]: line.get("reason") for line in rehearsal.lines(run)}
    assert how == {
        "copy]": "AssertionError: wrong numbers",
        "product]": "the process ended with SIGSEGV",
        "nothing]": "it took longer than 3 s",
        "small (no GPU)-eager]": None,
    }
    log = (run / "run.log").read_text()
    assert "crash.py" in log  # the stack of the bench that hung
    assert "the GPU does not answer any more: RuntimeError: CUDA error: an illegal memory access" in log


def test_bad_words_are_refused_in_one_line(tmp_path: Path):
    done = rehearsal.rehearse(tmp_path, PARTS="kernels,kernel")
    wanted = "PARTS: got 'kernel', wanted some of tests,kernels,blocks,steps,ncu,sanitizer\n"
    assert (done.returncode, done.stdout) == (2, wanted)


def test_results_lie_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A second run of the same second gets a folder of its own; a place that cannot be written is replaced."""
    found = H100 | {"date": "2026-11-26T10:18:39Z", "commit": "5d8cb3f", "sources": "501c6e8bab69"}
    first, second = (folder_for(found, tmp_path / "out", Run(60)) for _ in range(2))
    assert (first.name, second.name) == ("20261126T101839Z-nvidia-h100-5d8cb3f", f"{first.name}-2")
    assert folder_for(found | {"commit": None}, tmp_path / "out", Run(60)).name.endswith("-501c6e8bab69")
    assert capsys.readouterr().out == ""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = Run(60)
    assert folder_for(found, tmp_path / "file", run).parent == tmp_path and run.failed
    said = f"OUT={tmp_path / 'file'}: Not a directory; the results go to a temporary folder and to this output\n"
    assert capsys.readouterr().out == said


def test_output_for_a_full_disk_is_printed(tmp_path: Path, capfd):
    run = Run(60)
    run.folder = tmp_path
    (tmp_path / "run.log").symlink_to("/dev/full")
    assert run.call(["echo", "a row"], "run.log", 30) == 0
    assert "run.log: No space left on device: a row" in capfd.readouterr().out


def ends(pid: int, within: float) -> bool:
    """Whether a killed process ends: it runs until its processor sees the signal, and is then a zombie or gone."""
    stat = Path(f"/proc/{pid}/stat")
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_command_is_stopped_at_its_limit(tmp_path: Path):
    """It is asked to end, and killed when it does not, with what it started; what it printed stays."""
    run = Run(60)
    run.folder = tmp_path
    deaf = "trap '' TERM; sleep 600 & echo $!; wait"
    assert run.call(["bash", "-c", deaf], "run.log", 5) == 124
    started = int((tmp_path / "run.log").read_text().splitlines()[-1])
    assert ends(started, within=30)


def test_a_failed_build_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The last line of the build's output, and the architecture of the GPU that is there."""
    script = tmp_path / "python"
    script.write_text('#!/bin/bash\necho some output; echo "no compiler for sm_$FLG_CUDA_ARCHS"; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(gpu, "PY", str(script))
    monkeypatch.setattr(gpu, "STAMP", tmp_path / "stamp")
    for capability, arch in (([9, 0], "90a"), ([10, 0], "100")):
        run = Run(60)
        run.folder = tmp_path
        gpu.build(run, H100 | {"torch": {"gpu": {"capability": capability}}})
        wanted = f"build: no compiler for sm_{arch}; the rows of Triton and torch remain\n"
        assert capsys.readouterr().out == wanted and run.failed


def test_a_build_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The same sources for the same GPU are built once, and the record holds the registers of the module."""
    builds = tmp_path / "builds"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/bash\necho one >> {builds}\n")
    script.chmod(0o755)
    module = tmp_path / "fastlightgen" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.parent.mkdir()
    module.write_text("a module")
    monkeypatch.setattr(gpu, "PY", str(script))
    monkeypatch.setattr(gpu, "STAMP", tmp_path / "build" / "stamp")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "compiled_from", lambda: "sources")
    monkeypatch.setattr(machine, "registers", lambda library: {str(library): {"registers": 80}})
    run = Run(60)
    run.folder = tmp_path
    for _ in range(2):
        found = dict(H100)
        gpu.build(run, found)
        assert found["kernels"] == {str(module): {"registers": 80}} and not run.failed
    assert builds.read_text() == "one\n"
    assert capsys.readouterr().out.endswith("build: the compiled module is up to date\n")


def test_sigterm_ends_the_run_with_its_table(tmp_path: Path):
    env = rehearsal.environment(tmp_path, PARTS="kernels", CASES="ceilings or gate")
    process = subprocess.Popen([ROOT / "bench" / "gpu.sh"], env=env, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("results: "):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 143 and "seconds given" in rest
