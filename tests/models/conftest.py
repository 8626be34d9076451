from pathlib import Path

import pytest
from folders import CONFIG

from fastlightgen.models.folder.weights import build, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(build(CONFIG, seed=1), tmp_path / "model", stage=2, shift=3.0)
