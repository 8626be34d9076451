"""Shared code of the operators with a matrix product: the choice of CUTLASS, argument checks, gradients.

The CUTLASS kernels (csrc/gemm) need bfloat16 on Hopper. They are used for the products that were measured to be faster
than torch's on this GPU: `products.json` lists them, `python -m fastlightgen.ops.tune` measures. Without a measurement
torch computes the product, and always its gradient.
"""

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.tables import check_together

MEASURED = Path(__file__).with_name("products.json")


def takes(op: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the CUTLASS kernels compute this product. Not under torch.compile, which fuses epilogues itself."""
    return (
        x.dtype == cast_type(weight) == torch.bfloat16
        and not torch.compiler.is_compiling()
        and dispatch.backend_for(x.device.type) == "cuda"
        and dispatch.gemm_built()
        and _hopper(x.device.index)
        and x.numel() > 0
        and not (weight.shape[0] % 8 or weight.shape[1] % 8)  # TMA reads rows in units of 16 bytes
        and faster(op, weight.shape[0], weight.shape[1], x.device.index)
    )


def cast_type(t: Tensor) -> torch.dtype:
    """The type in which torch's own linear layer would take t: autocast's if it is on."""
    on = t.dtype == torch.float32 and torch.is_autocast_enabled(t.device.type)
    return torch.get_autocast_dtype(t.device.type) if on else t.dtype


def cast(t: Tensor) -> Tensor:
    """t in that type. The engine `local` keeps float32 weights and runs under autocast."""
    return t.to(cast_type(t))


def describe() -> str:
    """One line about the products of the CUTLASS kernels that networks use on this GPU."""
    if not torch.cuda.is_available() or not dispatch.gemm_built():
        return "products: torch's"
    rows = json.loads(MEASURED.read_text())
    products = {(row["op"], row["dim"], row["inner"]) for row in rows}
    used = sum(faster(*product, torch.cuda.current_device()) for product in products)
    return f"products: torch's, except {used} measured to be faster (python -m fastlightgen.ops.tune measures)"


@lru_cache
def faster(op: str, dim: int, inner: int, device: int) -> bool:
    """Whether all measurements of this product on this model of GPU found the kernel faster than torch."""
    product = {"gpu": torch.cuda.get_device_name(device), "op": op, "dim": dim, "inner": inner}
    found = [row for row in json.loads(MEASURED.read_text()) if product.items() <= row.items()]
    return bool(found) and all(row["us"] < row["torch_us"] for row in found)


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
