"""The error rule for every kernel: at most twice the error of torch's own operations in the same dtype."""

import torch
from torch import Tensor, nn


def leaves(case: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of the tensors that require gradients, cast to `dtype` if it is given."""
    return {name: t.detach().to(dtype or t.dtype).clone().requires_grad_() for name, t in case.items()}


def results(op, case: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All outputs of op(**case) and the gradients of all inputs, for fixed output gradients rounded to bfloat16."""
    inputs = leaves(case, dtype)
    outputs = op(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = []
    for i, out in enumerate(outputs):
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).bfloat16()
        seeds.append(seed.to(out.device, out.dtype))
    grads = torch.autograd.grad(outputs, list(inputs.values()), seeds)
    return {f"out{i}": out.detach() for i, out in enumerate(outputs)} | {f"d{n}": g for n, g in zip(inputs, grads)}


def check(got: dict[str, Tensor], own: dict[str, Tensor], exact: dict[str, Tensor], terms: int) -> None:
    """Assert that got is at most twice as far from exact as own, torch's result in the same dtype.

    Allowed in addition: the rounding to the result's dtype, and float32's in a sum of `terms` (random walk, factor 4).
    """
    assert got.keys() == exact.keys()
    for name, value in got.items():
        want = exact[name].double()
        assert value.isfinite().all(), f"{name}: an element was not written"
        assert own[name].dtype == value.dtype and own[name].shape == value.shape, name
        size = float(want.abs().max())
        floor = size * (torch.finfo(value.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps * terms**0.5)
        error, allowed = (float((v.double() - want).abs().max()) for v in (value, own[name]))
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, torch's own {allowed:.3g}, floor {floor:.3g}"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


class Part(nn.Module):
    """A module whose method run() calls a function, because a checkpoint takes a module's method."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def run(self, *args):
        return self.function(*args)
