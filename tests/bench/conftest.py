"""The modules of bench/ import each other by name, as pytest and Python find them there."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))


@pytest.fixture(scope="module", autouse=True)
def outside_xdist() -> Iterator[None]:
    """Let benches that a test starts measure: pytest-benchmark refuses in a process that names a worker of xdist."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)
        yield
