"""How a model is sampled and trained if nobody says otherwise: the preset with the same network, or its own files.

A preset stands for a released model. A folder is that model if its network has the same configuration. Where presets
share a network (Wan2.1 I2V at 480p and 720p), the folder's own time shift tells them apart.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastlightgen.config import preset, presets
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.files import read_json
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.weights import read_card

SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Sampling:
    """Settings of a model's own sampling, each with the place that it comes from."""

    preset: str  # the preset with the same network; "" if there is none
    values: Mapping[str, Any]  # steps, guidance, shift, and size as HEIGHTxWIDTHxFRAMES
    sources: Mapping[str, str]


def sampling(model: str | Path) -> Sampling:
    """The settings of a preset or a model folder; those of its own files win over its preset's, these over its
    family's."""
    config, name = config_of(model), str(model)
    family = family_of(config)
    where, own = ("", None) if name in presets() else own_shift(Path(model))
    same = [name] if name in presets() else [p for p in presets() if comparable(config) == network_of(p)]
    same.sort(key=lambda p: preset(p)["inference"]["shift"] != own)
    default = family.settings(config).released | {"size": family.clips.size}
    layers: list[tuple[str, Mapping[str, Any]]] = [(f"the default of {family.title}", default)]
    layers += [(preset_file(p), preset(p)["inference"]) for p in same[:1]]
    layers += [(where, {"shift": own})] if own is not None else []
    values = {key: value for _, settings in layers for key, value in settings.items()}
    sources = {key: source for source, settings in layers for key in settings}
    return Sampling(same[0] if same else "", values, sources)


def training(model: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(file, settings by section "stageN") that hold for training with a model folder; later ones win.

    They are those of its preset. The folder's own shift replaces the preset's unless the preset was made for it: then
    the preset also knows the shift that suits a student. [] for a folder that holds no known network.
    """
    try:
        known = sampling(model)
    except ValueError:  # the stage reports it
        return []
    settings = preset(known.preset) if known.preset else {}
    layers: list[tuple[str, Mapping[str, Any]]] = [(preset_file(known.preset), settings)] if settings else []
    shift = known.values["shift"]
    if not settings or settings["inference"]["shift"] != shift:
        layers.append((known.sources["shift"], {f"stage{n}": {"shift": shift} for n in range(4)}))
    return layers


def own_shift(folder: Path) -> tuple[str, float | None]:
    """The time shift in a folder's files, after the file's name: of a trained model's card, else of the scheduler."""
    if shift := read_card(folder).get("shift"):
        return str(folder / "fastlightgen.json"), shift
    path = folder / SCHEDULER
    settings = read_json(path) if path.is_file() else {}
    return str(path), settings.get("flow_shift") or settings.get("shift")


def preset_file(name: str) -> str:
    return f"configs/model/{name}.yaml"


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A complete configuration as JSON has it, where tuples are lists."""
    return json.loads(json.dumps(config))


@cache
def network_of(name: str) -> dict[str, Any]:
    """The complete configuration of a preset's network."""
    return comparable(config_of(name))
