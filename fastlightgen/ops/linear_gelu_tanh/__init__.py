"""The first half of a feed-forward layer: linear layer and GELU in one kernel, which keeps z for the backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.ops import dispatch
from fastlightgen.ops.gemm import cast, check, linear_gradients, takes
from fastlightgen.ops.linear_gelu_tanh import reference
from fastlightgen.ops.tables import dense

__all__ = ["linear_gelu_tanh"]

_NAME = "linear_gelu_tanh"


def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU(x weight^T + bias) by the tanh formula: x [..., K], weight [N, K], bias [N] -> [..., N]."""
    check(_NAME, x, weight, bias)
    if not takes(_NAME, x, weight):
        return reference.linear_gelu_tanh(x, weight, bias)
    weight, bias = cast(weight), None if bias is None else cast(bias)
    # A non-differentiable call does not store z.
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return _call(x, weight, bias, keep)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the result and z = x weight^T + bias; z is empty without `keep`."""
    if not takes(_NAME, x, weight):
        z = F.linear(x, weight, bias)
        return F.gelu(z, approximate="tanh"), z if keep else z.new_empty(0)
    x, weight, bias = dense(x), dense(weight), dense(bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    z = torch.empty_like(out) if keep else out.new_empty(0)
    rows, inner = x.numel() // x.shape[-1], x.shape[-1]
    device, stream = dispatch.queue(x)
    fields = {
        "out": out.data_ptr(), "z": z.data_ptr() if keep else 0, "x": x.data_ptr(), "weight": weight.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(), "rows": rows, "dim": len(weight), "inner": inner,
        "device": device, "stream": stream,
    }  # fmt: skip
    error = dispatch.compiled().linear_gelu_tanh(fields)
    dispatch.check(_NAME, error, x)
    return out, z


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return out, out.new_empty(out.shape if keep else (0,))


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    x, weight, bias, keep = inputs
    if not keep:
        raise ValueError(f"{_NAME}: got keep=False, but a gradient is needed; pass keep=True, which stores z")
    ctx.save_for_backward(x, weight, output[1])
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd would fill zeros for z's gradient


def _autograd(ctx, dout: Tensor, _dz: None) -> tuple:
    x, weight, z = ctx.saved_tensors
    dz = torch.ops.aten.gelu_backward(dout, z, approximate="tanh")
    return *linear_gradients(dz, x, weight, (*ctx.needs_input_grad[:2], ctx.has_bias)), None


_call = dispatch.register(
    f"{_NAME}(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor, Tensor)",
    _forward, _fake, _setup_context, _autograd,
)  # fmt: skip
