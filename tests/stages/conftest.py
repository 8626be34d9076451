"""The folders that Stage III starts from."""

import pytest
from helpers import KEPT, small_wan

from fastlightgen.models.folder.weights import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_model(small_wan(seed=1), root / "stage2", pruned_path=KEPT, source="there")
    save_model(small_wan(seed=2), root / "teacher")
    return [f"stage2_model={root / 'stage2'}", f"model={root / 'teacher'}"]
