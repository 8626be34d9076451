"""qk_norm_rope with the compiled kernels, csrc/ops/qk_norm_rope. Lists hold q's tensor, then k's."""

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import DTYPES


def _shape(x: Tensor, weight: Tensor, rope: list[Tensor], eps: float) -> tuple:
    """The launchers' arguments after the tensors: rotary tables, sizes, eps, type, device, stream."""
    batch, tokens, dim = x.shape
    frames, rows, cols = rope
    sizes, pairs = [], []
    for table in rope:
        size, n, _ = table.shape
        sizes.append(size)
        pairs.append(n)
    axes = [frames.data_ptr(), rows.data_ptr(), cols.data_ptr()], sizes, pairs
    per_head = weight.shape[0] != dim
    return *axes, batch * tokens, tokens, dim, 2 * sum(pairs), per_head, eps, DTYPES[x.dtype], *dispatch.queue(x)


def _pointers(tensors: list[Tensor]) -> list[int]:
    first, second = tensors
    return [first.data_ptr(), second.data_ptr()]


def forward(out: list[Tensor], x: list[Tensor], weight: list[Tensor], rope: list[Tensor], eps: float) -> None:
    """Write out. out, x are dense [B, L, D], weight float32 [D] or [head_dim], rope three tables [size, pairs, 2]."""
    shape = _shape(x[0], weight[0], rope, eps)
    error = dispatch.compiled().qk_norm_rope(*map(_pointers, (out, x, weight)), *shape)
    dispatch.check("qk_norm_rope", error, x[0])


def backward(
    dx: list[Tensor], dout: list[Tensor], x: list[Tensor], weight: list[Tensor], rope: list[Tensor], eps: float
) -> Tensor:
    """Write dx; return the weights' gradients [2, D] per column. For weights [head_dim] the caller adds the heads."""
    shape = _shape(x[0], weight[0], rope, eps)
    batch, tokens, dim = x[0].shape
    runs = dispatch.compiled().qk_norm_rope_runs(batch * tokens, dim, DTYPES[x[0].dtype], shape[-2])
    dispatch.check("qk_norm_rope", max(-runs, 0), x[0])  # a negative number is a cudaError
    sums, partial = (torch.empty(2, *n, dim, dtype=torch.float32, device=x[0].device) for n in ((), (runs,)))
    error = dispatch.compiled().qk_norm_rope_backward(
        _pointers(dx), sums.data_ptr(), partial.data_ptr(), *map(_pointers, (dout, x, weight)), *shape
    )
    dispatch.check("qk_norm_rope backward", error, x[0])
    return sums
