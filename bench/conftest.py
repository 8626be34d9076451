"""Skip the remaining benches of a file FLG_BENCH_CAP seconds after its start (bench/gpu.sh sets it)."""

import os
import time

import pytest

CAP = float(os.environ.get("FLG_BENCH_CAP", "inf"))
STARTED: dict[str, float] = {}


@pytest.fixture(autouse=True)
def within_its_time(request: pytest.FixtureRequest):
    spent = time.monotonic() - STARTED.setdefault(request.module.__name__, time.monotonic())
    if spent > CAP:
        pytest.skip(f"FLG_BENCH_CAP={CAP:g} seconds are over for this file")
