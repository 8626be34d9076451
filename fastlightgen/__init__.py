"""FastLightGen: distil large video diffusion transformers in sampling steps and in size at once.

The names in __all__ are the public Python interface. Each is imported at its first use, so that `import fastlightgen`
and `--help` take no time.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {  # name: the module that defines it
    "load_model": "fastlightgen.models.folder.weights",
    "save_model": "fastlightgen.models.folder.weights",
    "Stream": "fastlightgen.models.base",
    "Cond": "fastlightgen.models.base",
    "sample": "fastlightgen.models.sample",
}
_MODULES = (
    *("flow", "guidance", "ops", "blocks", "parallel", "models", "data", "metrics", "world", "pipelines"),
    *("engine", "planner", "stages", "methods", "config"),
)
__all__ = [*_WHERE, *_MODULES]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastlightgen.{name}")
    raise AttributeError(f"module 'fastlightgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
