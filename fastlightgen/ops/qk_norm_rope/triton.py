"""qk_norm_rope in Triton, with one launch for q and one for k. Same signatures as cuda.py.

A row is read and written whole. In between it is held as two blocks [heads, pairs], one of the even channels (a) and
one of the odd channels (b), so that a rotation combines equal positions of both. PF, PH, PW: pairs that frames, rows,
columns rotate; HB, P: padded block sizes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlightgen.ops.runs import on_device, split, warps


@triton.jit
def _turn(frames, rows, cols, token, H, W, PF: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, P: tl.constexpr):
    """Cosine and sine [1, P] of a grid token; each pair reads the table of its axis, the masks exclude each other."""
    pair = tl.arange(0, P)
    f, h, w = token // (H * W), token // W % H, token % W
    at_f, at_h, at_w = (f * PF + pair) * 2, (h * PH + pair - PF) * 2, (w * PW + pair - PF - PH) * 2
    in_f, in_h = pair < PF, (pair >= PF) & (pair < PF + PH)
    in_w = (pair >= PF + PH) & (pair < PF + PH + PW)
    cos = tl.load(frames + at_f, mask=in_f, other=0.0) + tl.load(rows + at_h, mask=in_h, other=0.0)
    sin = tl.load(frames + at_f + 1, mask=in_f, other=0.0) + tl.load(rows + at_h + 1, mask=in_h, other=0.0)
    cos += tl.load(cols + at_w, mask=in_w, other=0.0)
    sin += tl.load(cols + at_w + 1, mask=in_w, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def _places(HEADS: tl.constexpr, HEAD: tl.constexpr, HB: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr):
    """Of a row's block [heads, 2 P]: the columns, those of the norm's weight, and which ones exist."""
    head, channel = tl.arange(0, HB)[:, None], tl.arange(0, 2 * P)[None, :]
    col = head * HEAD + channel
    wide = channel + head * 0 if PER_HEAD else col  # of the weight: one per head channel, or one per column
    return col, wide, (head < HEADS) & (channel < HEAD)


@triton.jit
def _read(at, mask, HB: tl.constexpr, P: tl.constexpr):
    """The even and the odd channels [heads, P] of a block of neighbouring channels, in float32."""
    return tl.split(tl.reshape(tl.load(at, mask=mask, other=0.0).to(tl.float32), (HB, P, 2)))


@triton.jit
def _write(at, a, b, mask, HB: tl.constexpr, P: tl.constexpr):
    tl.store(at, tl.reshape(tl.join(a, b), (HB, 2 * P)).to(at.dtype.element_ty), mask=mask)


@triton.jit
def _mean(v, HEAD: tl.constexpr, HEADS: tl.constexpr, PER_HEAD: tl.constexpr):
    """The mean over each head [heads, 1] or over the row [1, 1]; v holds the sum of both channels of each pair."""
    heads = tl.sum(v, 1)[:, None]
    if PER_HEAD:
        return heads / HEAD
    else:
        return tl.sum(heads, 0)[None, :] / (HEAD * HEADS)


@triton.jit
def _forward(
    out, x, weight, frames, rows, cols, tokens, F, H, W, eps, HEADS: tl.constexpr, PF: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, HB: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    HEAD: tl.constexpr = 2 * (PF + PH + PW)
    # One program per row: norm, then rotate the pairs (a, b) by their angles if the token lies on the grid.
    row = tl.program_id(0).to(tl.int64)
    col, wide, mask = _places(HEADS, HEAD, HB, P, PER_HEAD)
    at = row * HEADS * HEAD + col
    a, b = _read(x + at, mask, HB, P)
    wa, wb = _read(weight + wide, mask, HB, P)
    rstd = 1.0 / tl.sqrt(_mean(a * a + b * b, HEAD, HEADS, PER_HEAD) + eps)
    a *= rstd * wa
    b *= rstd * wb
    token = row % tokens
    if token < F * H * W:
        cos, sin = _turn(frames, rows, cols, token, H, W, PF, PH, PW, P)
        turned = a * cos - b * sin
        b = a * sin + b * cos
        a = turned
    _write(out + at, a, b, mask, HB, P)


@triton.jit
def _backward(
    dx, partial, dout, x, weight, frames, rows, cols, tokens, F, H, W, total, eps, LENGTH: tl.constexpr,
    HEADS: tl.constexpr, PF: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, HB: tl.constexpr, P: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    HEAD: tl.constexpr = 2 * (PF + PH + PW)
    # One program per run of LENGTH rows. With n = x rstd, b = dout rotated back and g = weight b:
    # dx = rstd (g - n mean(g n)), dweight = sum n b.
    run = tl.program_id(0).to(tl.int64)
    col, wide, in_row = _places(HEADS, HEAD, HB, P, PER_HEAD)
    wa, wb = _read(weight + wide, in_row, HB, P)
    sum_a = tl.zeros([HB, P], tl.float32)
    sum_b = tl.zeros([HB, P], tl.float32)
    for i in range(LENGTH):  # rows past the last one are masked and add zeros to the sums
        row = run * LENGTH + i
        at = row * HEADS * HEAD + col
        mask = in_row & (row < total)
        a, b = _read(x + at, mask, HB, P)
        da, db = _read(dout + at, mask, HB, P)
        token = row % tokens
        if token < F * H * W:  # rotate dout back by the same angles
            cos, sin = _turn(frames, rows, cols, token, H, W, PF, PH, PW, P)
            back = da * cos + db * sin
            db = db * cos - da * sin
            da = back
        rstd = 1.0 / tl.sqrt(_mean(a * a + b * b, HEAD, HEADS, PER_HEAD) + eps)
        a *= rstd  # n
        b *= rstd
        sum_a += da * a
        sum_b += db * b
        da *= wa  # g
        db *= wb
        mean = _mean(da * a + db * b, HEAD, HEADS, PER_HEAD)
        _write(dx + at, rstd * (da - a * mean), rstd * (db - b * mean), mask, HB, P)
    _write(partial + run * HEADS * HEAD + col, sum_a, sum_b, in_row, HB, P)


def _shape(x: Tensor, weight: Tensor, rope: list[Tensor]) -> dict:
    """The kernels' compile-time constants."""
    pairs = [table.shape[1] for table in rope]
    heads = x.shape[-1] // (2 * sum(pairs))
    blocks = triton.next_power_of_2(heads), triton.next_power_of_2(sum(pairs))
    return dict(zip(("PF", "PH", "PW"), pairs)) | {
        "HEADS": heads, "HB": blocks[0], "P": blocks[1], "PER_HEAD": weight.numel() != x.shape[-1],
        "num_warps": warps(2 * blocks[0] * blocks[1]),
    }  # fmt: skip


def forward(out: list[Tensor], x: list[Tensor], weight: list[Tensor], rope: list[Tensor], eps: float) -> None:
    """Write out. out, x are dense [B, L, D], weight float32 [D] or [head_dim], rope three tables [size, pairs, 2]."""
    batch, tokens, _ = x[0].shape
    with on_device(x[0]):
        for o, i, w in zip(out, x, weight):
            _forward[(batch * tokens,)](o, i, w, *rope, tokens, *map(len, rope), eps, **_shape(i, w, rope))


def backward(
    dx: list[Tensor], dout: list[Tensor], x: list[Tensor], weight: list[Tensor], rope: list[Tensor], eps: float
) -> Tensor:
    """Write dx; return the weights' gradients [2, D] per column. For weights [head_dim] the caller adds the heads."""
    batch, tokens, dim = x[0].shape
    runs, length = split(batch * tokens, 1, x[0])
    partial = torch.empty(2, runs, dim, dtype=torch.float32, device=x[0].device)
    with on_device(x[0]):
        for i, tensors in enumerate(zip(dx, partial, dout, x, weight)):
            sizes = tokens, *map(len, rope), batch * tokens
            _backward[(runs,)](*tensors, *rope, *sizes, eps, LENGTH=length, **_shape(x[i], weight[i], rope))
    return partial.sum(1)  # torch adds in a fixed order
