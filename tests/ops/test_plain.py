"""The operators in torch's own functions against the registered ones, in float64, whose rounding is near 1e-16."""

import pytest
import torch

from fastlightgen.ops import plain, rope_factors

ops = torch.ops.fastlightgen
B, L, D = 2, 15, 24


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def same(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("rows", [1, 2, 6])  # for all, for each sample, for each 5 tokens
def test_norms(rows):
    x, y, gate, scale, shift = drawn(B, L, D), drawn(B, L, D), *drawn(3, rows, D)
    same([plain.norm_modulate(x, scale, shift, 1e-6)], [ops.norm_modulate(x, scale, shift, 1e-6)])
    one = scale[:1].expand(rows, -1), shift[:1].expand(rows, -1)  # an affine norm repeats its weight and bias
    for args in (
        (gate, scale, shift, False),
        (None, scale, shift, False),
        (gate, *one, True),
        (gate, None, None, True),
        (None, None, None, False),
    ):
        wanted = ops.gate_residual_norm_modulate(x, y, *args, 1e-6)
        same(plain.gate_residual_norm_modulate(x, y, *args, 1e-6), wanted)


@pytest.mark.parametrize("width", [D, 12])  # one norm for all heads, one for each
@pytest.mark.parametrize("grid", [(1, 3, 5), (2, 2, 3)])  # all tokens, and 3 of text after the grid
def test_rotation(width, grid):
    q, k, weights = drawn(B, L, D), drawn(B, L, D), drawn(2, width)
    rope = rope_factors(grid, (4, 4, 4), dtype=torch.float64)
    args = (q, k, *weights, *rope, 1e-6)
    same(plain.qk_norm_rope(*args), ops.qk_norm_rope(*args))
