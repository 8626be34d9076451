"""How ExecuTorch's XNNPACK can compute a network and a decoder: operations that it knows in place of those it does not.

It has no attention, no norms and no convolutions in three dimensions, and it refuses tensors of more than six.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastlightgen.config import UserError

MOST_DIMS = 6  # of a tensor in XNNPACK
aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale q k^T) v, stored as torch's kernel stores it: heads next to each other."""
    assert not (dropout or causal or enable_gqa)
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -1e9) if mask.dtype == torch.bool else mask)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).contiguous().transpose(1, 2)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return y if weight is None else y * weight


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn: bool = True,
) -> Tensor:
    y = rms_norm(x - x.mean(-1, keepdim=True), shape, weight, eps)
    return y if bias is None else y + bias


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """XNNPACK has the exact function alone, which is up to 5e-4 from the tanh formula."""
    if approximate == "none":
        return NotImplemented
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """Of one clip: a linear layer if the patches do not overlap, else one in two dimensions.

    The frames that a frame of the output reads become its channels.
    """
    out, channels, frames, height, width = weight.shape
    if len(x) > 1 or groups > 1 or set(dilation) != {1}:
        raise UserError("to=executorch: knows convolutions of one clip without groups and dilation; use to=onnx")
    if any(padding):
        x = F.pad(x, [n for p in reversed(padding) for n in (p, p)])
    if frames == 1 and (frames, height, width) == tuple(stride):
        return patches(x, weight, bias)
    starts = range(0, x.shape[2] - frames + 1, stride[0])
    cut = [x[:, :, i : i + frames].reshape(1, channels * frames, *x.shape[3:]) for i in starts]
    y = F.conv2d(torch.cat(cut), weight.reshape(out, channels * frames, height, width), bias, stride[1:])
    return y.transpose(0, 1).contiguous().unsqueeze(0)


def patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose patches do not overlap and have one frame, as a linear layer."""
    out, channels, _, height, width = weight.shape
    _, _, f, h, w = x.shape
    cut = x.reshape(channels, f, h // height, height, w // width, width).permute(1, 2, 4, 0, 3, 5)
    rows = F.linear(cut.reshape(1, -1, channels * height * width), weight.reshape(out, -1), bias)
    return rows.transpose(1, 2).contiguous().reshape(1, out, f, h // height, w // width)


def enlarged(x: Tensor, size: Sequence[int] | None, scales: Sequence[float] | None) -> Tensor:
    """Each frame, row and column (or row and column) several times, a whole number of times."""
    sides = x.shape[2:]
    wanted = [int(n * f) for n, f in zip(sides, scales, strict=True)] if scales is not None else list(size or ())
    for dim, (n, m) in enumerate(zip(sides, wanted, strict=True), 2):
        if m % n:
            raise UserError(f"to=executorch: enlarges {n} to {m}, which is no whole number of times; use to=onnx")
        if m > n:
            spread = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], m // n, *x.shape[dim + 1 :])
            x = spread.reshape(*x.shape[:dim], m, *x.shape[dim + 1 :])
    return x


def length(
    x: Tensor, power: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The Euclidean length along `dim`."""
    if power != 2 or dtype is not None:
        return NotImplemented
    return torch.sqrt((x * x).sum(None if dim is None else list(dim), keepdim))


def permute(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Of many dimensions, those that stay neighbours move as one."""
    if x.dim() <= MOST_DIMS:
        return NotImplemented
    dims = [d % x.dim() for d in dims]
    runs: list[list[int]] = []
    for d in dims:
        if runs and d == runs[-1][-1] + 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    before = sorted(runs)
    merged = x.reshape([math.prod(x.shape[d] for d in run) for run in before])
    moved = merged.permute([before.index(run) for run in runs]).contiguous()
    return moved.reshape([x.shape[d] for d in dims])


KNOWN: dict[torch._ops.OperatorBase, Callable] = {
    aten.scaled_dot_product_attention.default: attention,
    aten.rms_norm.default: rms_norm,
    aten.layer_norm.default: layer_norm,
    aten.gelu.default: gelu,
    aten.conv3d.default: conv3d,
    aten.upsample_nearest3d.vec: enlarged,
    aten.upsample_nearest2d.vec: enlarged,
    aten._upsample_nearest_exact2d.vec: enlarged,
    aten.linalg_vector_norm.default: length,
    aten.permute.default: permute,
}


def source(node: fx.Node) -> fx.Node:
    """What an operation reads first."""
    given = node.args[0]
    assert isinstance(given, fx.Node)
    return given


def keeps_order(node: fx.Node) -> bool:
    """Does this operation leave the numbers in their order in memory?"""
    copies = node.target is aten.clone.default and source(node).meta["val"].is_contiguous()
    return node.target in VIEWS or copies


def is_idle(node: fx.Node) -> bool:
    """Does this operation hand on what it gets?"""
    if node.target is aten.clone.default:
        return source(node).meta["val"].stride() == node.meta["val"].stride()
    return node.target is aten.type_as.default and source(node).meta["val"].dtype == node.meta["val"].dtype


def shortened(graph: fx.Graph) -> None:
    """Leave out what does nothing, and let a view of a view be one: no shape of many dimensions stands between them."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "call_function" and is_idle(node):
            node.replace_all_uses_with(source(node))
    for node in graph.nodes:
        if node.target in VIEWS:
            start = source(node)
            while keeps_order(start):
                start = source(start)
            node.target, node.args = aten.view.default, (start, *node.args[1:])
    graph.eliminate_dead_code()
