"""Every operator of the library: registered as torch wants it, and traced whole by torch.compile."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor

from fastlightgen.ops import rope_factors

G = partial(torch.randn, generator=torch.Generator().manual_seed(0))
ROPE = tuple(rope_factors((2, 1, 3), (4, 2, 2)))


def leaf(*size: int) -> Tensor:
    return G(*size).requires_grad_()


X, Y, DH = (leaf(2, 3, 8) for _ in range(3))
GATE, SCALE, SHIFT = (leaf(2, 8) for _ in range(3))
Q, K, WEIGHT = leaf(2, 7, 16), leaf(2, 7, 16), leaf(8)
V, ONE = (2, 4, 8), torch.rand(2)
# Operators without a gradient of their own get tensors that want none.
CASES = {
    "norm_modulate": (X, SCALE, SHIFT, 1e-6),
    "gate_residual_norm_modulate": (X, Y, GATE, SCALE, SHIFT, False, 1e-6),
    "gate_residual_norm_modulate_backward": (*(t.detach() for t in (DH, X, X, Y, GATE, SCALE)), False, 1e-6),
    "gate_residual_norm_modulate_fork": (X, Y, GATE, SCALE, SHIFT, leaf(2, 8), leaf(2, 8), 1e-6),
    "gate_residual_norm_modulate_fork_backward": (*(t.detach() for t in (DH, Y, X, X, Y, GATE, SCALE, SHIFT)), 1e-6),
    "qk_norm_rope": (Q, K, WEIGHT, WEIGHT.detach().clone().requires_grad_(), *ROPE, 1e-6),
    "qk_norm_rope_backward": (*(t.detach() for t in (Q, K, Q, K, WEIGHT, WEIGHT)), *ROPE, 1e-6),
    "dmd_gradient": (G(V), G(V), ONE, G(V), G(V), G(V), G(V), ONE, ONE),
    "linear_gate_residual": (X, GATE, leaf(2, 3, 4), leaf(8, 4), leaf(8)),
    "linear_gelu_tanh": (X, leaf(16, 8), leaf(16), True),
}


def test_no_operator_is_left_out():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastlightgen::")}
    assert {re.sub("^fastlightgen::", "", name) for name in names} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str):
    """Schema, fake implementation, autograd registration, and gradients under compilation."""
    torch.library.opcheck(getattr(torch.ops.fastlightgen, name).default, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name: str):
    """One graph, results and gradients those of eager."""
    op, args = getattr(torch.ops.fastlightgen, name).default, CASES[name]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def run(call) -> tuple:
        outputs = call(*args)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [out for out in outputs if out.requires_grad]
        return *outputs, *(torch.autograd.grad(wanted, leaves, [out.cos() for out in wanted]) if leaves else ())

    torch._dynamo.reset()
    for got, want in zip(run(torch.compile(op, backend="aot_eager", fullgraph=True)), run(op), strict=True):
        torch.testing.assert_close(got, want)
