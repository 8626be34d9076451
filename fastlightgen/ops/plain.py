"""The fused operators written with torch's own, in real numbers and without writes in place: for other runtimes.

A traced network holds the fused operators; `PLAIN` names what to put in their place. The tables are as the operators
get them: M rows of gate, scale and shift, each for 1 / M of the rows of x.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops.fastlightgen


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    rows = x.reshape(len(scale), -1, x.shape[-1])
    return (F.layer_norm(rows, rows.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]).view(x.shape)


def gate_residual_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, affine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    if gate is not None:
        y = (y.reshape(len(gate), -1, y.shape[-1]) * gate[:, None]).view(x.shape)
    x = x + y
    if scale is not None and shift is not None and not affine:
        return x, norm_modulate(x, scale, shift, eps)
    # All rows of an affine norm's tables are equal.
    weight, bias = (None if table is None else table[0] for table in (scale, shift))
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, frames: Tensor, rows: Tensor, cols: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grid, tables = (len(frames), len(rows), len(cols)), (frames, rows, cols)
    spread = [
        table.view(*(len(table) if axis == i else 1 for axis in range(3)), -1, 2).expand(*grid, -1, -1)
        for i, table in enumerate(tables)
    ]
    cos, sin = torch.cat(spread, -2).flatten(0, 2)[:, None].unbind(-1)  # [F H W, 1, pairs]
    return norm_rope(q, q_weight, cos, sin, eps), norm_rope(k, k_weight, cos, sin, eps)


def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    heads, tokens = x.unflatten(-1, (-1, 2 * cos.shape[-1])), len(cos)
    if len(weight) == x.shape[-1]:
        heads = F.rms_norm(x, weight.shape, weight, eps).view_as(heads)
    else:
        heads = F.rms_norm(heads, weight.shape, weight, eps)
    a, b = heads[:, :tokens].unflatten(-1, (-1, 2)).unbind(-1)  # (a + i b) (cos + i sin)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned, heads[:, tokens:]], 1).flatten(-2) if tokens < x.shape[1] else turned.flatten(-2)


PLAIN: dict[torch._ops.OperatorBase, Callable] = {
    ops.norm_modulate.default: norm_modulate,
    ops.gate_residual_norm_modulate.default: gate_residual_norm_modulate,
    ops.qk_norm_rope.default: qk_norm_rope,
}
