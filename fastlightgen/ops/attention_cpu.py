"""Softmax attention in 16 bits on a CPU, from matrix products.

Torch's flash kernel for CPUs takes 2 to 4 times as long for the small calls of the built-in world, forward and backward
together (bench/bench_attention.py). This one rounds where a flash kernel does: logits and softmax are float32,
probabilities and products 16 bits.
"""

import torch
from torch import Tensor

from fastlightgen.ops.dispatch import unobserved
from fastlightgen.ops.gemm import cast, cast_type

LOGITS = 2**18  # of a few heads at a time, 1 MB in float32, which a core's cache holds
LARGEST = 2**20  # logits per head; with more of them torch's kernel is as fast


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a call without a mask, of [B, heads, L, head_dim] tensors, is one for this kernel."""
    return (
        q.device.type == "cpu"
        and cast_type(q) == cast_type(k) == cast_type(v)
        and cast_type(q) in (torch.bfloat16, torch.float16)
        and 0 < q.shape[2] * k.shape[2] <= LARGEST
        and unobserved((q, k, v))
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v."""
    return Attention.apply(cast(q), cast(k), cast(v))


class Attention(torch.autograd.Function):
    """Keeps q, k and v for the backward pass, which computes the probabilities again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        with torch.autocast("cpu", enabled=False):
            out = [torch.bmm(probabilities(a, b), c) for a, b, c in parts(q, k, v)]
        return torch.cat(out).view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = [], [], []
        with torch.autocast("cpu", enabled=False):
            for a, b, c, d in parts(q, k, v, dout):
                p = probabilities(a, b)
                dp = torch.bmm(d, c.mT)
                dlogits = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # p (dp - sum p dp)
                dq.append(torch.bmm(dlogits, b))
                dk.append(torch.bmm(dlogits.mT, a))
                dv.append(torch.bmm(p.mT, d))
            scale = q.shape[-1] ** -0.5
            return torch.cat(dq).view(q.shape) * scale, torch.cat(dk).view(k.shape) * scale, torch.cat(dv).view(v.shape)


def parts(*tensors: Tensor) -> zip:
    """Some heads at a time, [heads, L, head_dim] of each tensor; the first two are q and k."""
    q, k = tensors[:2]
    heads = max(1, LOGITS // (q.shape[2] * k.shape[2]))
    return zip(*(t.flatten(0, 1).split(heads) for t in tensors), strict=True)


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q.float() * q.shape[-1] ** -0.5, k.float().mT).softmax(-1).to(q.dtype)
