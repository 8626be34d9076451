"""The specification of qk_norm_rope. Shapes: B batch, L tokens, D = heads x head_dim."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class Rope(tuple):
    """Three rotary tables, for frames, rows and columns: cosine and sine, each [size, pairs, 2]."""

    @cached_property
    def turn(self) -> Tensor:
        """The rotations per token, computed once for all blocks of a network."""
        return per_token(self, self[0].dtype)


def rope_factors(
    grid: tuple[int, int, int], dims: tuple[int, int, int], theta: float = 10000.0, device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rope:  # fmt: skip
    """The rotary tables of a grid (F, H, W); `dims` are the channels of a head that each axis rotates."""
    tables = []
    for size, dim in zip(grid, dims, strict=True):
        # Pair i of an axis rotates by position * theta^(-2 i / dim); float64, because the angles grow large.
        freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.outer(torch.arange(size, dtype=torch.float64, device=device), freq)
        tables.append(torch.stack([angle.cos(), angle.sin()], -1).to(dtype))
    return Rope(tables)


def per_token(rope: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """The rotations of all grid tokens as complex numbers [F H W, 1, head_dim / 2], frame slowest."""
    grid = [len(table) for table in rope]
    parts = []
    for axis, table in enumerate(rope):
        shape = [1, 1, 1, table.shape[1]]
        shape[axis] = len(table)
        parts.append(torch.view_as_complex(table.to(wide)).view(shape).expand(*grid, -1))
    return torch.cat(parts, -1).flatten(0, 2)[:, None]


def norm_rope(x: Tensor, weight: Tensor, turn: Tensor, eps: float) -> Tensor:
    """RMS norm over the row (weight [D]) or each head (weight [head_dim]), then the rotation of the grid tokens."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    heads = x.to(wide).unflatten(-1, (-1, 2 * turn.shape[-1]))
    if weight.shape[-1] == x.shape[-1]:
        heads = F.rms_norm(heads.flatten(-2), (x.shape[-1],), weight.to(wide), eps).view_as(heads)
    else:
        heads = F.rms_norm(heads, weight.shape, weight.to(wide), eps)
    image, text = heads[:, : len(turn)], heads[:, len(turn) :]
    image = torch.view_as_real(torch.view_as_complex(image.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    return (torch.cat([image, text], 1) if text.shape[1] else image).flatten(-2).to(x.dtype)


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Apply norm_rope to q and k, computed in float32 (float64 stays float64) and rounded once."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    turn = rope.turn if isinstance(rope, Rope) and rope[0].dtype == wide else per_token(rope, wide)
    return norm_rope(q, q_weight, turn, eps), norm_rope(k, k_weight, turn, eps)


def gradient(dout: Tensor, x: Tensor, weight: Tensor, turn: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With n = x rstd, b = dout rotated back, g = weight b: dx = rstd (g - n mean(g n)), dweight = sum n b."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    back = dout.to(wide).unflatten(-1, (-1, 2 * turn.shape[-1]))
    image, text = back[:, : len(turn)], back[:, len(turn) :]
    # conj() only sets a flag, which AOTAutograd's runtime does not resolve inside an operator, so conjugate in memory.
    image = torch.view_as_complex(image.unflatten(-1, (-1, 2)).contiguous()) * turn.conj_physical()
    back = torch.cat([torch.view_as_real(image).flatten(-2), text], 1)
    heads = x.to(wide).unflatten(-1, (-1, 2 * turn.shape[-1]))
    if weight.shape[-1] == x.shape[-1]:
        back, heads = back.flatten(-2), heads.flatten(-2)
    rstd = (heads.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = heads * rstd
    g = back * weight.to(wide)
    dx = rstd * (g - n * (g * n).mean(-1, keepdim=True))
    return dx.view(x.shape).to(x.dtype), (back * n).flatten(0, -2).sum(0).to(weight.dtype)
