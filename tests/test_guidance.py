"""Guidance: the special cases of Eq. 9 and the broadcasting of one scale per sample."""

import pytest
import torch
from torch import Tensor

from fastlightgen import guidance


@pytest.fixture
def v() -> tuple[Tensor, Tensor, Tensor]:
    """v_weak_cond, v_weak_null, v_strong_cond."""
    return tuple(torch.randn(3, 3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_cfg_special_cases(v):
    cond, null, _ = v
    torch.testing.assert_close(guidance.cfg(cond, null, 1.0), cond)
    torch.testing.assert_close(guidance.cfg(cond, null, 0.0), null)
    torch.testing.assert_close(guidance.cfg(cond, null, 3.0), 3 * cond - 2 * null)


def test_well_guided_special_cases(v):
    cond, null, strong = v
    torch.testing.assert_close(guidance.well_guided(cond, null, strong, 1.0, 1.0), strong)
    torch.testing.assert_close(guidance.well_guided(cond, null, strong, 3.5, 0.0), guidance.cfg(cond, null, 3.5))
    torch.testing.assert_close(guidance.well_guided(cond, null, strong, 0.0, 0.0), null)
    # Weak and strong the same network: beta2 says nothing.
    torch.testing.assert_close(guidance.well_guided(cond, null, cond, 2.0, 0.7), guidance.cfg(cond, null, 2.0))


def test_well_guided_by_hand():
    cond, null, strong = (torch.tensor([[x]]) for x in (2.0, 0.5, 3.0))
    # 3.5 (2 - 0.5) + 0.25 (3 - 2) + 0.5
    assert guidance.well_guided(cond, null, strong, 3.5, 0.25).item() == 6.0


def test_one_scale_per_sample_equals_samples_one_by_one(v):
    cond, null, strong = v
    beta1, beta2 = torch.tensor([2.5, 3.5, 4.5]), torch.tensor([0.15, 0.25, 0.35])
    mixed = guidance.well_guided(cond, null, strong, beta1, beta2)
    plain = guidance.cfg(cond, null, beta1)
    for i in range(3):
        a, b = beta1[i].item(), beta2[i].item()
        assert torch.equal(mixed[i], guidance.well_guided(cond[i], null[i], strong[i], a, b))
        assert torch.equal(plain[i], guidance.cfg(cond[i], null[i], a))
