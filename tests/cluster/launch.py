"""Start real ranks for a test, with gloo on the CPU, and end them with the test."""

import importlib.util
import json
import os
import time
from collections.abc import Container, Iterable
from pathlib import Path

import pytest
from forks import ROOT, Fork

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 900.0  # seconds; a busy machine needs a tenth of it. A hanging collective would wait for twice as long.

# What ranks import before their first step.
IMPORTS = [
    "torch._dynamo",
    "torch._inductor.compile_fx",
    *(["deepspeed"] if importlib.util.find_spec("deepspeed") else []),
]


def wait_for(file: Path, process: Fork) -> None:
    """Wait until a process has created the file. The test's own time limit ends the wait."""
    while not file.exists():
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.02)


def launch(ranks: int, *words: str, module: bool = True, **variables: str) -> Fork:
    """Start torchrun with `ranks` processes: the train command, or with module=False the file in words[0]."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "fastlightgen.train"] if module else []
    last = {w.split("=", 1)[0]: w for w in words}  # a later word replaces an earlier one
    return Fork([*command, *last.values()], env, IMPORTS)


def ranks_of(process: Fork) -> list:
    """Return torchrun's ranks as psutil processes, in the order of their start."""
    import psutil

    try:
        return sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    except psutil.NoSuchProcess:
        return []


def finish(process: Fork, seconds: float = PATIENCE) -> tuple[str, str]:
    """Return stdout and stderr of a process. After `seconds` kill it and its ranks."""
    import psutil

    started = ranks_of(process)
    try:
        return process.communicate(timeout=seconds)
    finally:
        for child in [*started, *ranks_of(process)]:
            try:
                child.kill()  # psutil checks that the id does not belong to a new process
            except psutil.NoSuchProcess:
                pass
        process.kill()


def on_ranks(count: int, cases: dict, folder: Path) -> dict:
    """Run the worker on `count` ranks and return its results by case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    process = launch(count, str(WORKER), str(folder / "cases.json"), str(folder / "results.json"), module=False)
    out, err = finish(process)
    assert process.returncode == 0, err[-4000:]
    return json.loads((folder / "results.json").read_text())


def each(names: Iterable[str], seldom: Container[str]) -> list:
    """Return the parameters of a test, one per case; those of the cases in `seldom` are slow tests."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in seldom else []) for name in names]


def chosen(request: pytest.FixtureRequest, cases: dict, seldom: Container[str]) -> dict:
    """Return the cases without those in `seldom` that no selected test names."""
    named = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    return {name: case for name, case in cases.items() if name not in seldom or name in named}
