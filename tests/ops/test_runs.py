"""The cut of rows into runs (csrc/include/flg/runs.h): every row once, equal runs, full waves."""

import pytest
import simt as shim
import torch

# Rows and rows per modulation row: Wan at 480p and 720p, two samples, a modulation per frame, HunyuanVideo, small ones.
SHAPES = [(32760, 32760), (75600, 75600), (65520, 32760), (32760, 1560), (119056, 119056), (40, 40), (37, 1), (35, 7)]
# Blocks that an H100 runs at once: Wan 14B backward and forward, Wan 1.3B backward and forward; the shim's.
WORKERS = [132, 1056, 528, 3168, 8]


@pytest.fixture(autouse=True)
def compiler():
    if shim.COMPILER is None:
        pytest.skip("g++ is not installed")


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(("rows", "rows_per_mod"), SHAPES)
def test_every_row_is_in_one_run_of_its_modulation_row(rows: int, rows_per_mod: int, workers: int):
    first, last = shim.runs(rows, rows_per_mod, workers).unbind(1)
    assert first[0] == 0 and last[-1] == rows and torch.equal(first[1:], last[:-1])
    assert torch.equal(first // rows_per_mod, (last - 1) // rows_per_mod)
    length = last - first
    assert length.min() >= 1 and length.max() - length.min() <= 1


def rows_of_time(rows: int, rows_per_mod: int, workers: int) -> int:
    """Rows that the busiest of `workers` blocks handles, each of which takes the next run when it is done with one."""
    busy = [0] * workers
    first, last = shim.runs(rows, rows_per_mod, workers).unbind(1)
    for length in (last - first).tolist():
        busy[busy.index(min(busy))] += length
    return max(busy)


@pytest.mark.parametrize("workers", WORKERS[:3])
@pytest.mark.parametrize(("rows", "rows_per_mod"), SHAPES[:5])
def test_waves_are_full(rows: int, rows_per_mod: int, workers: int):
    """The busiest block has at most one row more than an equal share.

    21 modulation rows (one per frame) cannot be cut into 132 equal parts: up to 1% of the blocks' time is lost.
    """
    share = rows / workers * (1.01 if rows_per_mod == 1560 else 1.0)
    assert rows_of_time(rows, rows_per_mod, workers) <= share + 1


def test_a_choice_by_hand():
    """Two samples of 100 rows on 7 blocks: 3 runs each leave one of 7 idle; 7 runs each fill two waves."""
    assert len(shim.runs(200, 100, 7)) == 14
    assert shim.runs(10, 10, 4).tolist() == [[0, 3], [3, 6], [6, 8], [8, 10]]
