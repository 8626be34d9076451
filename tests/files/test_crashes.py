"""kill -9 before any change of a file, of every command that writes: the same command continues to the same result.

Two moments per command; FLG_CRASHES=N takes N (`make soak` takes many).
"""

import os
import random
import shutil
import signal

import pytest
import torch
from crashes import CASES, forked
from helpers import assert_same

MOMENTS = int(os.environ.get("FLG_CRASHES", "2"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_killed_command_goes_on(case, tmp_path, request):
    command, outcome = case
    torch.set_num_threads(1)
    places = tmp_path / "x"
    places.mkdir()
    status, changes = forked(lambda: command(places / "whole"), places)
    assert status == 0 and changes > 0
    wanted = outcome(places / "whole")
    draw = random.Random(f"{request.node.name} {os.environ.get('FLG_CRASH_SEED', '')}")
    moments = draw.sample(range(1, changes + 1), min(MOMENTS, changes))
    for moment in moments:
        where = places / f"at-{moment}"
        status, _ = forked(lambda where=where: command(where), places, moment)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, changes, status)
        status, _ = forked(lambda where=where: command(where), places)
        assert status == 0, f"after a kill before change {moment} of {changes}"
        assert_same(outcome(where), wanted)
        shutil.rmtree(where, ignore_errors=True)
