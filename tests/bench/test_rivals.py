"""The code that torch.compile gets in the benches computes the same as the specification."""

import pytest
import torch
from rivals import real_qk_norm_rope, turns

from fastlightgen.ops import rope_factors
from fastlightgen.ops.qk_norm_rope import reference


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("text", [0, 3])
def test_real_numbers_rotate_like_complex_ones(per_head: bool, text: int):
    grid, axes, heads = (2, 3, 2), (4, 2, 2), 3
    tokens, dim = 12 + text, 8 * heads
    q, k = torch.randn(2, 2, tokens, dim).unbind()
    q_weight, k_weight = torch.rand(2, 8 if per_head else dim).unbind()
    rope = rope_factors(grid, axes)
    got = real_qk_norm_rope(q, k, q_weight, k_weight, *turns(rope, tokens), 1e-6)
    wide = [t.double() for t in (q, k, q_weight, k_weight)]
    wanted = reference.qk_norm_rope(*wide, rope_factors(grid, axes, dtype=torch.float64), 1e-6)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)  # float32 rounds to 6e-8; norm, turn and sum
