"""docs/play, for its tests: the folder, and make.py as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parents[1] / "docs/play"


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("play_make", PAGE / "make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
