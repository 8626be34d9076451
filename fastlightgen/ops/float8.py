"""Linear layers in float8 (e4m3, 448 the largest number), for what carries no gradient.

Every row of the input and every output channel of the weight has a scale of its own: its largest element becomes 448.
A GPU computes the product with torch's scaled product, other devices with the same numbers in float32. So a CPU shows
the error that float8 causes.

Shapes: x [..., K], weight [N, K], bias [N]; M rows in x.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448.0  # the largest number of float8_e4m3fn
MULTIPLE = 16  # K and N must be multiples of it: a rule of torch's scaled product
SLAB = 2**24  # elements that are divided at a time: the quotients are float32, four times as large as the result
CAPABILITY = (8, 9)  # the first GPUs with float8 products


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """The reason why a device cannot run float8 linear layers of a network in `dtype`, or ""."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return "AMD's GPUs have another float8 format"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        return f"this GPU is sm_{major}{minor}; float8 products begin with sm_{CAPABILITY[0]}{CAPABILITY[1]}"
    # torch's product with scales per row takes a bias for 16-bit results only.
    return "" if dtype == torch.bfloat16 else "on a GPU it needs dtype=bfloat16"


def takes(outputs: int, inputs: int) -> bool:
    """Whether a linear layer of this size can run in float8."""
    return outputs % MULTIPLE == 0 and inputs % MULTIPLE == 0


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8 rows q [M, K] and float32 scales [M, 1] with scale q = x [M, K], up to the rounding of q."""
    with torch.autocast(x.device.type, enabled=False):  # it knows no float8
        largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).float()
        scale = largest.clamp(min=1e-12) / LARGEST  # the bound is for rows of zeros
        slab = max(1, SLAB // x.shape[-1])
        slabs = zip(x.split(slab), scale.split(slab), strict=True)
        return torch.cat([(rows / by).to(torch.float8_e4m3fn) for rows, by in slabs]), scale


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (scale weight)^T + bias in `dtype`, with x rounded to float8; `quantised` makes `weight` and `scale` [N, 1].

    Products are summed in float32, then multiplied by both scales. The bias is rounded to `dtype` before it is added.
    """
    with torch.autocast(x.device.type, enabled=False):
        rows, row_scale = quantised(x.reshape(-1, x.shape[-1]))
        product = scaled_product if x.device.type == "cuda" else emulated
        return product(rows, row_scale, weight, scale, bias, dtype).view(*x.shape[:-1], len(weight))


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """torch's scaled product. It takes its second operand column by column, which a transposed weight is.

    With a bias its result has 16 bits, so that of a float32 stream (engine=local measures held-out errors in float32)
    is rounded to bfloat16.
    """
    narrow = torch.bfloat16 if dtype == torch.float32 else dtype
    bias, by_row = None if bias is None else bias.to(narrow), F.ScalingType.RowWise
    y = F.scaled_mm(x, weight.mT, x_scale, by_row, scale.mT, by_row, bias=bias, output_dtype=narrow)
    return y.to(dtype)


def emulated(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same numbers in float32: a product of two float8 numbers is exact there."""
    y = (x.float() @ weight.float().mT) * x_scale * scale.mT
    return (y if bias is None else y + bias.to(dtype)).to(dtype)
