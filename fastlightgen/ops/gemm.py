"""Shared code of the operators with a matrix product: the choice of CUTLASS, argument checks, gradients.

The CUTLASS kernels (csrc/gemm) need bfloat16 on Hopper. Without them torch computes both the product and its gradient.
"""

from functools import lru_cache

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import check_together


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the CUTLASS kernels compute this product. Not under torch.compile, which fuses epilogues itself."""
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
        and dispatch.backend_for(x.device.type) == "cuda"
        and dispatch.gemm_built()
        and _hopper(x.device.index)
        and x.numel() > 0
        and not (weight.shape[0] % 8 or weight.shape[1] % 8)  # TMA reads rows in units of 16 bytes
    )


@lru_cache
def _hopper(device: int) -> bool:
    """Whether the GPU is a Hopper: the kernels use wgmma, which no other GPU has."""
    return torch.cuda.get_device_capability(device) == (9, 0)


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, **others: Tensor) -> None:
    """Raise ValueError unless x [..., K], weight [N, K] and bias [N] fit together and lie on one device."""
    check_together(op, x, weight=weight, bias=bias, **others)
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        got = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"{op}: got {got}; wanted [..., K], [N, K] and [N] or none; transpose or reshape them")


def linear_gradients(
    dz: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of z = x weight^T + bias for x, weight and bias; None for those not `wanted`."""
    rows = dz.reshape(-1, dz.shape[-1])
    dx = dz @ weight if wanted[0] else None
    dweight = rows.mT @ x.reshape(-1, x.shape[-1]) if wanted[1] else None
    return dx, dweight, rows.sum(0) if wanted[2] else None
