"""RMS norm and three-axis rotary embedding of q and k. Wan norms over all heads together, HunyuanVideo each head."""

from types import ModuleType

import torch
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.qk_norm_rope import reference
from fastlightgen.ops.qk_norm_rope.reference import Rope, rope_factors
from fastlightgen.ops.tables import check_together, dense, kernel_takes

__all__ = ["Rope", "qk_norm_rope", "rope_factors"]

_NAME = "qk_norm_rope"
WIDEST_HEAD = 192  # twice FLG_ROPE_PAIRS in csrc/ops/qk_norm_rope/qk_norm_rope.h; the reference computes wider heads


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Return q and k [B, L, D], each RMS-normed, times its weight, then rotated in interleaved pairs of channels.

    A weight [D] norms over all heads together, a weight [head_dim] each head. `rope` (from `rope_factors`) holds cosine
    and sine per frame [F, pairs, 2], row [H, pairs, 2] and column [W, pairs, 2]; their pairs add up to head_dim / 2.
    The first F H W tokens are the video grid, frame slowest; tokens after them (text) are normed but not rotated.
    """
    _check(q, k, q_weight, k_weight, rope)
    if q.is_cpu and not torch.compiler.is_compiling() and dispatch.backend_for("cpu") == "reference":
        return reference.qk_norm_rope(q, k, q_weight, k_weight, rope, eps)
    return _call(q, k, q_weight, k_weight, *rope, eps)


def _check(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope) -> None:
    """Raise ValueError unless shapes, types and devices fit together."""
    shape = q.shape
    if len(shape) != 3 or k.shape != shape or k.dtype != q.dtype:
        got = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}"
        raise ValueError(f"{_NAME}: got {got}, wanted two [B, L, D] alike; reshape or cast them")
    check_together(_NAME, q, k=k, q_weight=q_weight, k_weight=k_weight, rope=rope[0])
    (frames, f, _), (rows, r, _), (cols, c, _) = rope[0].shape, rope[1].shape, rope[2].shape
    head_dim, tokens = 2 * (f + r + c), frames * rows * cols
    if shape[2] % head_dim or tokens > shape[1]:
        got = f"tables for head_dim {head_dim} and {tokens} tokens, q {tuple(q.shape)}"
        raise ValueError(f"{_NAME}: rope got {got}, wanted a divisor of D and at most L tokens; build it for this grid")
    if q_weight.shape != k_weight.shape or q_weight.dim() != 1 or q_weight.shape[0] not in (shape[2], head_dim):
        got = f"{tuple(q_weight.shape)} and {tuple(k_weight.shape)}"
        raise ValueError(f"{_NAME}: weights got {got}, wanted ({q.shape[-1]},) or ({head_dim},) twice; reshape them")


def _kernels(q: Tensor, weight: Tensor, rope: list[Tensor]) -> ModuleType | None:
    """The module whose kernels compute this call, or None for the reference."""
    head_dim = 2 * (rope[0].shape[1] + rope[1].shape[1] + rope[2].shape[1])
    backend, lanes = dispatch.backend_for(q.device.type), head_dim // 8
    # A norm per head sums over `lanes` lanes of a warp by halving: a power of two.
    heads_fit = weight.shape[0] == q.shape[2] or lanes & (lanes - 1) == 0
    on_grid = min(len(rope[0]), len(rope[1]), len(rope[2])) > 0
    takes = head_dim % 8 == 0 and head_dim <= WIDEST_HEAD and heads_fit and on_grid and kernel_takes(q)
    return None if backend == "reference" or not takes else dispatch.kernels(_NAME, backend)


def _prepared(tensors: list[Tensor]) -> list[Tensor]:
    """Tables or weights as the kernels read them: float32, dense, aligned."""
    return [dense(t if t.dtype == torch.float32 else t.float()) for t in tensors]


def _forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, frames: Tensor, rows: Tensor, cols: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    rope = [frames, rows, cols]
    kernels = _kernels(q, q_weight, rope)
    if kernels is None:
        q, k = reference.qk_norm_rope(q, k, q_weight, k_weight, rope, eps)
        return q.contiguous(), k.contiguous()
    x = [dense(q), dense(k)]
    out = [torch.empty_like(x[0]), torch.empty_like(x[1])]
    kernels.forward(out, x, _prepared([q_weight, k_weight]), _prepared(rope), eps)
    return out[0], out[1]


def _backward(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, frames: Tensor, rows: Tensor,
    cols: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, q_weight and k_weight from those of the results, dq and dk."""
    rope = [frames, rows, cols]
    kernels = _kernels(q, q_weight, rope)
    if kernels is None:
        turn = reference.per_token(rope, torch.float64 if q.dtype == torch.float64 else torch.float32)
        q_grads, k_grads = (reference.gradient(*a, turn, eps) for a in ((dq, q, q_weight), (dk, k, k_weight)))
        return q_grads[0].contiguous(), k_grads[0].contiguous(), q_grads[1], k_grads[1]
    x, dout = [dense(q), dense(k)], [dense(dq), dense(dk)]
    dx = [torch.empty_like(x[0]), torch.empty_like(x[1])]
    sums = kernels.backward(dx, dout, x, _prepared([q_weight, k_weight]), _prepared(rope), eps)
    dw = sums.view(2, -1, q_weight.numel()).sum(1).to(q_weight.dtype)  # adds the heads if they share a weight
    return dx[0], dx[1], dw[0].clone(), dw[1].clone()


def _fake(q, k, q_weight, k_weight, frames, rows, cols, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(dq, dk, q, k, q_weight, k_weight, frames, rows, cols, eps):
    return tuple(t.new_empty(t.shape) for t in (q, k, q_weight, k_weight))


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dq: Tensor, dk: Tensor) -> tuple:
    grads = torch.ops.fastlightgen.qk_norm_rope_backward(dq, dk, *ctx.saved_tensors, ctx.eps)
    return *grads, None, None, None, None


_TENSORS = "Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor frames, Tensor rows, Tensor cols, float eps"
_call = dispatch.register(f"{_NAME}({_TENSORS}) -> (Tensor, Tensor)", _forward, _fake, _setup_context, _autograd)
dispatch.register(
    f"{_NAME}_backward(Tensor dq, Tensor dk, {_TENSORS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward, _fake_backward,
)  # fmt: skip
