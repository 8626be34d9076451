"""qk_norm_rope with the compiled kernels, csrc/ops/qk_norm_rope. Lists hold q's tensor, then k's."""

from typing import Any

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import DTYPES


def _shape(x: Tensor, weight: Tensor, rope: list[Tensor], eps: float) -> dict[str, Any]:
    """The launchers' fields beside the tensors: rotary tables, sizes, eps, type, device, stream."""
    batch, tokens, dim = x.shape
    frames, rows, cols = rope
    sizes, pairs = [], []
    for table in rope:
        size, n, _ = table.shape
        sizes.append(size)
        pairs.append(n)
    device, stream = dispatch.queue(x)
    return {
        "factors": (frames.data_ptr(), rows.data_ptr(), cols.data_ptr()), "size": sizes, "pairs": pairs,
        "rows": batch * tokens, "tokens": tokens, "dim": dim, "head_dim": 2 * sum(pairs),
        "per_head": weight.shape[0] != dim, "eps": eps, "dtype": DTYPES[x.dtype], "device": device, "stream": stream,
    }  # fmt: skip


def _pointers(tensors: list[Tensor]) -> tuple[int, int]:
    first, second = tensors
    return first.data_ptr(), second.data_ptr()


def forward(out: list[Tensor], x: list[Tensor], weight: list[Tensor], rope: list[Tensor], eps: float) -> None:
    """Write out. out, x are dense [B, L, D], weight float32 [D] or [head_dim], rope three tables [size, pairs, 2]."""
    fields = _shape(x[0], weight[0], rope, eps)
    fields |= {"out": _pointers(out), "x": _pointers(x), "weight": _pointers(weight)}
    error = dispatch.compiled().qk_norm_rope(fields)
    dispatch.check("qk_norm_rope", error, x[0])


def backward(
    dx: list[Tensor], dout: list[Tensor], x: list[Tensor], weight: list[Tensor], rope: list[Tensor], eps: float
) -> Tensor:
    """Write dx; return the weights' gradients [2, D] per column. For weights [head_dim] the caller adds the heads."""
    fields = _shape(x[0], weight[0], rope, eps)
    dim, device = fields["dim"], fields["device"]
    runs = dispatch.compiled().qk_norm_rope_runs(fields["rows"], dim, fields["head_dim"], fields["dtype"], device)
    dispatch.check("qk_norm_rope", max(-runs, 0), x[0])  # a negative number is a cudaError
    sums, partial = (torch.empty(2, *n, dim, dtype=torch.float32, device=x[0].device) for n in ((), (runs,)))
    fields |= {
        "dx": _pointers(dx), "sums": sums.data_ptr(), "partial": partial.data_ptr(), "dout": _pointers(dout),
        "x": _pointers(x), "weight": _pointers(weight),
    }  # fmt: skip
    error = dispatch.compiled().qk_norm_rope_backward(fields)
    dispatch.check("qk_norm_rope backward", error, x[0])
    return sums
