"""norm_modulate through the compiled kernel, csrc/ops/norm_modulate."""

import torch
from torch import Tensor

from fastlightgen.ops.dispatch import extension

_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # flg_dtype in csrc/include/flg/check.h


def forward(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, rows_per_mod: int, eps: float) -> None:
    """x, out [R, D] contiguous; scale, shift [M, D] float32, unit stride in D; row r uses row r // rows_per_mod."""
    rows, dim = x.shape
    error = extension().norm_modulate(
        out.data_ptr(), x.data_ptr(), scale.data_ptr(), shift.data_ptr(), rows, dim, rows_per_mod,
        scale.stride(0), shift.stride(0), eps, _DTYPE[x.dtype], x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(
            f"norm_modulate: no launch, cudaError {error}, x {tuple(x.shape)} {x.dtype}; set FLG_OPS=reference to go on"
        )
