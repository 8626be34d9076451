"""What a command says when it fails: one line, without control characters, also when the memory is full."""

import pytest
import torch

from fastlightgen.config import cli


@pytest.mark.parametrize(
    "error, said",
    [
        (ValueError("a\nb\x1b[31mc"), "error: a b?[31mc"),
        (OSError(28, "No space left on device", "x"), "error: [Errno 28] No space left on device: 'x'"),
        (MemoryError(), "error: out of memory; `fastlightgen plan`"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "error: out of memory;"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "error: out of memory;"),
        (ValueError("x" * 100_000), "error: xxx"),
    ],
)
def test_one_line(error, said, monkeypatch, capsys):
    def fail(cfg):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(fail, "report", ["run=r"])
    found = capsys.readouterr().err
    assert stop.value.code == 2 and found.startswith(said) and found.count("\n") == 1 and len(found) < 2_020


def test_a_mistake_of_the_program_keeps_its_traceback():
    def fail(cfg):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError):
        cli.main(fail, "report", ["run=r"])
