"""The CUDA sources under the address and undefined-behaviour sanitizers: no access outside a tensor."""

import subprocess
import sys
from pathlib import Path

import pytest
import simt as shim
from helpers import without_flags

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shim.COMPILER is None, reason="g++ is not installed")
def test_under_sanitizers():
    """Runs in a separate process, because the sanitizer must be loaded first."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run([shim.COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(done.stdout.strip())
        if not Path(libraries[-1]).is_absolute():
            pytest.skip(f"{name} is not installed")
    env = without_flags() | {
        "FLG_SIMT": str(shim.build("sanitized")),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep their memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [HERE / f"test_{op}.py" for op in ("gate_residual_norm_modulate", "qk_norm_rope", "dmd_gradient")]
    chosen = "cuda_sources or run_never"
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-k", chosen, "-p", "no:cacheprovider", "-s"]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr, done.stderr[-4000:]
