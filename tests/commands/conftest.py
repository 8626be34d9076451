"""Evaluations in these tests compare with few real clips, because measuring 2,048 of them takes 17 s."""

from collections.abc import Iterator

import pytest

from fastlightgen.world import score


@pytest.fixture(autouse=True, scope="module")
def few_real_clips() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "REFERENCE_CLIPS", 256)
        score.reference.cache_clear()
        yield
    score.reference.cache_clear()
