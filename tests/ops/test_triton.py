"""The Triton kernels under Triton's interpreter on the CPU, by the error rule of the CUDA kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "gate_residual_norm_modulate": (
        "[t.agrees(v, (2, 5, 24), d) for v in t.VARIANTS for d in t.DTYPES]",
        "[t.agrees('gated', (1, 2, w), torch.bfloat16) for w in (1536, 5120)]",
    ),
    "qk_norm_rope": (
        "[t.agrees(*t.CASES[0], d) for d in t.DTYPES]",
        "[t.agrees(*s, torch.bfloat16) for s in t.CASES[1:]]",
        "t.agrees(1536, 128, False, 0, torch.bfloat16)",
    ),
    "training": ("t.agrees(2)",),
    "dmd_gradient": ("[t.check_kernel(d, s, 'cpu') for d in t.TYPES for s in ((3, 8), (3, 16, 5, 8, 8))]",),
}


pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("op", CASES)
def test_under_the_interpreter(op: str):
    interpret(op, CASES[op])


@pytest.mark.slow
def test_every_shape_in_every_type():
    interpret("qk_norm_rope", ("[t.agrees(*s, d) for s in t.CASES for d in t.DTYPES]",))


@pytest.mark.slow
def test_a_hundred_steps_of_training():
    interpret("training", ("t.agrees(100)",))


def interpret(op: str, lines: tuple[str, ...]) -> None:
    """Runs in a separate process, because triton reads TRITON_INTERPRET at its import."""
    head = f"import torch, test_{op} as t; from fastlightgen.ops import dispatch"
    poison = "torch.use_deterministic_algorithms(True)"  # fills torch.empty with NaN
    code = "\n".join([head, poison, "assert dispatch.backend_for('cpu') == 'triton'", *lines])
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "1", "FLG_OPS": "triton", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
