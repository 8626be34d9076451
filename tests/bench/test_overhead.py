"""What bench_overhead calls without a GPU: the launchers themselves, for an H100, without a kernel."""

import pytest
import simt
import torch

from fastlightgen.ops import dispatch


@pytest.mark.slow  # compiles the launchers with optimisation
def test_launchers_do_their_arithmetic_and_launch_nothing(monkeypatch: pytest.MonkeyPatch):
    """The rows are cut for 132 multiprocessors instead of the shim's two, and the result keeps its old numbers."""
    if simt.COMPILER is None:
        pytest.skip("g++ is not installed")
    rows, dim, bfloat16 = 32760, 5120, 2
    modules = simt.extension(), simt.launchers()
    few, many = (m.gate_residual_norm_modulate_runs(rows, dim, rows, bfloat16, 0) for m in modules)
    assert 0 < few < 132 <= many

    monkeypatch.setattr(dispatch, "extension", simt.launchers)
    monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    v, one, grad = torch.ones(1, 16), torch.ones(1), torch.full((1, 16), 7.0)
    dispatch.kernels("dmd_gradient", "cuda").forward(grad, one.clone(), [v, v], [v] * 4, [one] * 3)
    assert grad.tolist() == [[7.0] * 16]
