"""Recipes: configs/recipes/NAME.yaml, the settings of a model on a machine, for `train` and for `plan`.

A recipe is a file for config= with three kinds of entries more. `models` lists the presets that it is for. `machine`
holds keys of `plan`. `stage1`, `stage2` and `stage3` hold the keys of one stage.
"""

import difflib
import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlightgen.config.fields import ConfigError
from fastlightgen.config.files import config_root, flatten, read_yaml
from fastlightgen.config.layers import leaves, unknown_key
from fastlightgen.config.plan import Machine
from fastlightgen.config.stages import DEFAULT, STAGES, root

FOLDER = "configs/recipes"


@dataclass(frozen=True)
class Recipe:
    """What a recipe is for."""

    name: str
    models: tuple[str, ...]
    gpu: str
    gpus: int
    size: str = ""  # of the clips, if it is not the model's own

    @property
    def machine(self) -> str:
        """The machine in words."""
        return f"{self.gpus} x {self.gpu}" + (f" with clips of {self.size}" if self.size else "")

    @property
    def word(self) -> str:
        """The word of a command line that takes it."""
        return f"config={FOLDER}/{self.name}.yaml"


def recipes() -> list[Recipe]:
    """The recipes that ship, by name."""
    found = []
    for path in sorted((config_root() / "recipes").glob("*.yaml")):
        content = read_yaml(path)
        gpu, gpus, size = (content["machine"].get(key, "") for key in ("gpu", "gpus", "size"))
        found.append(Recipe(path.stem, tuple(content["models"]), str(gpu), gpus, size))
    return found


def file_keys(file: str, command: str, given: dict[str, Any]) -> dict[str, Any]:
    """The keys of a file for config= that concern a command and its stage; `given`: keys of the command line."""
    content = read_yaml(find(file))
    if command not in ("train", "plan"):
        return flatten(content)
    models, machine = content.pop("models", []), content.pop("machine", {})
    check_keys(machine, Machine, file)
    stage = str(given.get("stage", content.get("stage", "3")))
    sections = {n: content.pop(f"stage{n}", {}) for n in STAGES if f"stage{n}" in content}
    if stage == "all":
        content |= {f"stage{n}": keys for n, keys in sections.items() if n != "0"}
    for n, keys in sections.items():
        method = keys.get("method", DEFAULT) if isinstance(keys, dict) else DEFAULT
        check_keys(keys, root(n, {n: str(method)}), file)
    own = flatten(content) | (sections.get(stage, {}) if stage != "all" else {})
    return ({"model": models[0]} if models else {}) | own | (machine if command == "plan" else {})


def check_keys(section: Any, cls: type, file: str) -> None:
    """Refuse a section with a key that the class lacks."""
    if not isinstance(section, dict):
        raise ConfigError(f"{file}: a section holds {section!r}; wanted lines of the form key: value")
    for key, value in section.items():
        if key not in leaves(cls):
            raise ConfigError(f"{unknown_key(key, value, cls)} (in {file})")


def find(file: str) -> str | Path:
    """The file itself; if there is none, the shipped recipe of this name, or of this path as in a checkout."""
    if os.path.exists(file):
        return file
    folder, name = os.path.split(file)
    shipped = {path.stem: path for path in (config_root() / "recipes").glob("*.yaml")}
    stem = name.removesuffix(".yaml")
    if folder not in ("", FOLDER):
        return file
    if stem in shipped:
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped, n=1)
    hint = f"did you mean config={FOLDER}/{near[0]}.yaml?" if near else f"the recipes are {', '.join(sorted(shipped))}"
    raise ConfigError(f"config={file}: there is no such file; {hint}")
