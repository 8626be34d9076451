"""Every operator passes torch's checks of its registration, and torch.compile traces it into one graph."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlightgen.ops import gate_residual_norm_modulate, norm_modulate, rope_factors

G = partial(torch.randn, generator=torch.Generator().manual_seed(0))
ROPE = tuple(rope_factors((2, 1, 3), (4, 2, 2)))


def leaf(*size: int) -> Tensor:
    return G(*size).requires_grad_()


X, Y, DH = (leaf(2, 3, 8) for _ in range(3))
GATE, SCALE, SHIFT = (leaf(2, 8) for _ in range(3))
MODS = [t.detach() for t in (GATE, SCALE, SHIFT)]
Q, K, WEIGHT = leaf(2, 7, 16), leaf(2, 7, 16), leaf(8)
V, ONE = (2, 4, 8), torch.rand(2)
# Operators without a gradient get tensors that do not require one.
CASES = {
    "norm_modulate": (X, SCALE, SHIFT, 1e-6),
    "gate_residual_norm_modulate": (X, Y, GATE, SCALE, SHIFT, False, 1e-6),
    "gate_residual_norm_modulate_backward": (*(t.detach() for t in (DH, X, X, Y, GATE, SCALE)), False, 1e-6),
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
    """torch.library.opcheck: schema, fake implementation, autograd registration, gradients under compilation."""
    torch.library.opcheck(getattr(torch.ops.fastlightgen, name).default, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name: str):
    """Compilation gives one graph, with the results and gradients of eager mode."""
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


class Seen(TorchDispatchMode):
    """Records the names of operators that go through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tracked", [False, True])
def test_whoever_listens_to_the_dispatcher_sees_the_operator(simt, tracked: bool):
    """An unobserved call bypasses the dispatcher; the results have the same bits."""
    x = G(2, 3, 8).requires_grad_(tracked)
    want = gate_residual_norm_modulate(x, x, *MODS)
    with Seen() as seen:
        got = gate_residual_norm_modulate(x, x, *MODS)
    assert "fastlightgen::gate_residual_norm_modulate" in seen.names and "aten::empty_like" not in seen.names
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad == tracked for a, b in zip(got, want))


def test_tensors_without_memory_never_reach_a_kernel(simt):
    """Fake tensors, inside and outside of their mode, and tensors of a transform."""
    tensors = torch.ones(2, 3, 8), *MODS[1:]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        assert norm_modulate(*fake).shape == (2, 3, 8)
    assert type(norm_modulate(*fake)) is type(fake[0])
    gradient = torch.func.grad(lambda x: norm_modulate(x, *MODS[1:]).square().sum())
    with pytest.raises(RuntimeError, match="generate_vmap_rule|setup_context"):  # torch's message: not supported
        gradient(torch.randn(2, 3, 8))
