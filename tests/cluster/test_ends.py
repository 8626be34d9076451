"""Ranks end with os._exit on every path, because the interpreter's shutdown can abort in gloo's threads."""

import pytest
from launch import finish, launch

# The train command, in which each rank runs `work`. A shutdown of the interpreter would print "tears down".
CODE = """
import atexit, sys
from fastlightgen import train
from fastlightgen.config import main
from fastlightgen.parallel import ranks
class Announced:
    def __del__(self, write=sys.stderr.write):
        write("the interpreter tears down")
announced = Announced()
atexit.register(print, "exit handlers have run")
def run(cfg):
    group = ranks.sequence_group(2, 60.0)
{work}
train.run, gone = run, ranks.gone
ranks.gone = lambda: gone(1.0)  # seconds; a rank that has not signed in by then has ended
main(train.train, "train", ["stage=2", "engine=deepspeed", "run=r"])
"""
ENDS = {  # name -> (code, the ranks' exit codes, lines of errors)
    "work done": ("    ranks.barrier()", 0, []),
    "an error of both": ('    raise ValueError("no good")', 2, ["error: no good"]),
    "an interruption": ("    raise KeyboardInterrupt", 130, ["interrupted"]),
    "a mistake in the program": ("    assert ranks.rank() < 0", 1, []),
    "a partner that has gone": (
        "    ranks.rank() == 1 and ranks.end_process(0)\n    ranks.barrier()",
        2,
        ["error: rank 1 of 2 has gone; run the same command"],
    ),
}
SELDOM = ("an interruption", "a mistake in the program")  # slow tests: they differ from the other errors by a line


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in ENDS]
)
def test_no_rank_leaves_its_end_to_the_interpreter(tmp_path, monkeypatch, name):
    work, code, errors = ENDS[name]
    (tmp_path / "train.py").write_text(CODE.format(work=work))
    monkeypatch.chdir(tmp_path)
    process = launch(2, str(tmp_path / "train.py"), module=False)
    out, err = finish(process)
    ended = out.count("exit handlers have run")  # torchrun kills ranks that are slower than the one that failed
    assert 1 + (code == 0) <= ended <= 2 and "tears down" not in err and "terminate called" not in err, err
    assert (process.returncode == 0) == (code == 0) and (not code or f"exitcode  : {code} " in err), err
    said = [line.removeprefix("rank 1: ") for line in err.splitlines() if line.startswith(("error: ", "interrupted"))]
    assert len(said) == len(errors) and all(a.replace("rank 1: ", "").startswith(b) for a, b in zip(said, errors)), err
    assert ("AssertionError" in err) == (code == 1)
