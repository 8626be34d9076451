"""The fixture `simt` runs the CUDA sources on the CPU: it replaces the compiled module by the shim's."""

import pytest
import simt as shim
import torch

from fastlightgen.ops import dispatch


@pytest.fixture
def simt(monkeypatch: pytest.MonkeyPatch):
    """CPU tensors go through the CUDA kernels' sources; torch.empty returns NaN, so that unwritten elements show."""
    if shim.COMPILER is None:
        pytest.skip("g++ is not installed")
    module = shim.extension()
    monkeypatch.setattr(dispatch, "extension", lambda: module)
    monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "cuda")
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    yield module
    torch.use_deterministic_algorithms(False)
