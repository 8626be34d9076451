"""`python bench/once.py OPERATOR.. [small]`: run the kernels of some operators once, for a profiler or a sanitizer.

Forward and backward, in the width of Wan 14B; `small` takes few rows. Without a GPU there are fewer still.
"""

import sys
from collections.abc import Callable

import kernels
import pytest
import torch
from kernels import DEVICE, GPU, draw
from order import OPERATORS
from torch import Tensor

from fastlightgen import ops

Call = Callable[[], tuple[Tensor, ...]]
WIDTH = 5120 if GPU else 256
GRIDS = {False: (21, 30, 52) if GPU else (1, 2, 3), True: (3, 8, 11) if GPU else (1, 2, 3)}  # by `small`


def with_gradients(op: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Call:
    """A call that returns the results and the gradient of every input."""
    leaves = [t.requires_grad_() for t in inputs]

    def call() -> tuple[Tensor, ...]:
        out = op(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        return *(t.detach() for t in out), *torch.autograd.grad(out, leaves, [torch.ones_like(t) for t in out])

    return call


def hidden(small: bool) -> Tensor:
    frames, rows, columns = GRIDS[small]
    return draw(1, frames * rows * columns, WIDTH)


def table() -> Tensor:
    return draw(1, WIDTH, dtype=torch.float32)


def norm_modulate(small: bool) -> Call:
    return with_gradients(ops.norm_modulate, hidden(small), table(), table())


def gate_residual_norm_modulate(small: bool) -> Call:
    x, y = hidden(small), hidden(small)
    return with_gradients(ops.gate_residual_norm_modulate, x, y, table(), table(), table())


def qk_norm_rope(small: bool) -> Call:
    rope = ops.rope_factors(GRIDS[small], (44, 42, 42), device=torch.device(DEVICE))
    tensors = hidden(small), hidden(small), draw(WIDTH), draw(WIDTH)
    return with_gradients(lambda *t: ops.qk_norm_rope(*t, rope), *tensors)


def dmd_gradient(small: bool) -> Call:
    size = (1, 16, 3, 60, 104) if small and GPU else (1, 16, 21, 60, 104) if GPU else (1, 16, 3, 8, 8)
    x0, x_t, *v = (draw(*size) for _ in range(6))
    t, beta1, beta2 = (torch.full((1,), 0.5, device=DEVICE) for _ in range(3))
    return lambda: ops.dmd_gradient(x0, x_t, t, *v, beta1, beta2)


KERNELS: dict[str, Callable[[bool], Call]] = {name: globals()[name] for name in OPERATORS}


def run(name: str, small: bool) -> bool:
    """Run one operator; return whether all its results are finite."""
    out = KERNELS[name](small)()
    finite = all(bool(t.isfinite().all()) for t in out)  # also waits for the GPU
    how = "the CUDA sources on the CPU shim" if kernels.SIMT else ops.describe()
    print(f"{name}: {how}; all results are {'finite' if finite else 'NOT finite'}", flush=True)
    return finite


if __name__ == "__main__":
    if kernels.SIMT:
        kernels.use(pytest.MonkeyPatch(), "cuda")
    names = [word for word in sys.argv[1:] if word != "small"]
    sys.exit(0 if all([run(name, "small" in sys.argv) for name in names]) else 1)
