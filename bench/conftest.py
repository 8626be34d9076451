"""The order of the benches, one line of results per bench as soon as it ends, limits of time, and a summary.

bench/gpu.py sets these variables:
FLG_BENCH_OUT=DIR: append each bench's line to DIR/<part>.jsonl. Benches that already have a line there do not run
again: after a crash, a second process goes on behind the bench that crashed.
FLG_BENCH_RUNNING=FILE: holds the name of the running bench; it is gone when the process has come to its end.
FLG_BENCH_CAP=SECONDS: skip the remaining benches after this time.
FLG_BENCH_LONGEST=SECONDS: end the process when one bench takes longer.
"""

import faulthandler
import os
import sys
import time
from pathlib import Path

import pytest
import rows
import torch
from order import BROKEN_GPU, part_of, phase

CAP, LONGEST = (float(os.environ.get(f"FLG_BENCH_{name}", "inf")) for name in ("CAP", "LONGEST"))
OUT, RUNNING = (
    Path(os.environ[f"FLG_BENCH_{n}"]) if f"FLG_BENCH_{n}" in os.environ else None for n in ("OUT", "RUNNING")
)
STARTED = time.monotonic()
WHERE = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU, which says nothing about a GPU's speed"
measured: list[dict] = []  # the rows of this process
ended: dict[str, int] = {}  # how the benches ended -> how many


def file_of(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("bench_")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, for want of a package, gets a line too; the other files run."""
    name = report.nodeid.rpartition("/")[2].removesuffix(".py").removeprefix("bench_")
    if report.failed and OUT and (part := part_of(name)) and report.nodeid not in {r["case"] for r in rows.read(OUT)}:
        last = str(report.longrepr).strip().splitlines()[-1].removeprefix("E").strip()
        rows.append(OUT / f"{part}.jsonl", {"case": report.nodeid, "outcome": "failed", "reason": last})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    done = {row["case"] for row in rows.read(OUT)} if OUT else set()
    items[:] = [item for item in items if item.nodeid not in done]
    items.sort(key=lambda item: phase(file_of(item), getattr(item, "callspec", None) and item.callspec.params or {}))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    if RUNNING:
        RUNNING.write_text(f"{part_of(file_of(item))} {item.nodeid}")
    if LONGEST < float("inf"):  # the stack of a bench that hangs goes to the log
        faulthandler.dump_traceback_later(LONGEST, exit=True, file=sys.__stderr__)
    try:
        return (yield)
    finally:  # also when pytest.exit ends the process, whose shutdown takes seconds on a busy machine
        faulthandler.cancel_dump_traceback_later()


def pytest_sessionfinish() -> None:
    if RUNNING:
        RUNNING.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def within_its_time():
    if time.monotonic() - STARTED > CAP:
        pytest.skip(f"FLG_BENCH_CAP={CAP:g} seconds are over")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        _write(item, call, report)
    return report


def _write(item: pytest.Item, call: pytest.CallInfo, report: pytest.TestReport) -> None:
    """Write the bench's line: its numbers, or in one sentence why there are none."""
    how = "measured" if report.passed else report.outcome
    row = {"case": item.nodeid, "outcome": how, "seconds": round(call.duration, 2)}
    if report.passed:
        benchmark = item.funcargs["benchmark"]
        row |= {"group": benchmark.group, "contender": item.name, **benchmark.extra_info}
        measured.append(row)
    else:
        row["reason"] = rows.sentence(call.excinfo.value)
    ended[how] = ended.get(how, 0) + 1
    if OUT and (part := part_of(file_of(item))):
        rows.append(OUT / f"{part}.jsonl", row)
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU does not answer any more: {rows.sentence(error)}", BROKEN_GPU)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ended:
        return
    counts = ", ".join(f"{n} {how}" for how, n in sorted(ended.items()))
    terminalreporter.section(f"{counts}, on {WHERE}")
    for line in rows.lines(measured):
        terminalreporter.write_line(line)
