"""Tests run offline, and pytest-xdist's workers share the cores, so that they time alike on all machines."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

from collections.abc import Callable, Iterator
from pathlib import Path

import pipelines
import pytest
import tally
import torch
from locks import alone

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
THREADS = max(1, min(2, (os.cpu_count() or 1) // WORKERS))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of the processes that tests start
torch.set_num_threads(THREADS)


def pytest_collection_finish() -> None:
    """The collector need not look through torch and the tests' own code again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def process_settings() -> Iterator[None]:
    """Commands change settings of the process; every test begins with the same ones, whatever ran before it."""
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(False)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Callable[[str], Path]:
    """`pipeline("wan_t2v")` is the folder of a very small diffusers pipeline; do not write into it."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if WORKERS > 1 else base) / "pipelines"  # workers have a folder each below the run's own
    root.mkdir(exist_ok=True)

    def folder(kind: str) -> Path:
        with alone(root / f"{kind}.lock"):
            if not (root / kind).exists():
                pipelines.KINDS[kind](root / f"{kind}.part").rename(root / kind)
        return root / kind

    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    words = " ".join(str(word) for word in session.config.invocation_params.args)
    tally.written(f"FLG_FAULTS_OUT=FILE pytest {words}", session.testsfailed)
