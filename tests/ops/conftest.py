"""The CUDA sources on this CPU: `simt` puts the shim's extension in the place of the compiled one."""

import pytest
import simt as shim
import torch

from fastlightgen.ops import dispatch


@pytest.fixture
def simt(monkeypatch: pytest.MonkeyPatch):
    """CPU tensors go through the CUDA kernels' own sources; every torch.empty starts as NaN."""
    if shim.COMPILER is None:
        pytest.skip("g++ is not installed")
    module = shim.extension()
    monkeypatch.setattr(dispatch, "extension", lambda: module)
    monkeypatch.setattr(dispatch, "queue", lambda x: (0, 0))
    monkeypatch.setattr(dispatch, "backend_for", lambda device: "cuda")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns: an element left unwritten shows
    yield module
    torch.use_deterministic_algorithms(False)
