"""The distribution-matching gradient of Stage III: Eq. 8 under the well-guided teacher of Eq. 9."""

from fastlightgen.ops.dmd_gradient.reference import dmd_gradient

__all__ = ["dmd_gradient"]
