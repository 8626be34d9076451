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
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import GUIDER
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.experts import expert_of, experts_of
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.weights import read_card

SCHEDULER, GUIDER_CONFIG = "scheduler/scheduler_config.json", "guider_config.json"


Layer = tuple[str, Mapping[str, Any]]  # settings, after the place that they come from


@dataclass(frozen=True)
class Sampling:
    """Settings of a model's own sampling, each with the place that it comes from."""

    preset: str  # the preset with the same network; "" if there is none
    values: Mapping[str, Any]  # steps, guidance, shift, and size as HEIGHTxWIDTHxFRAMES
    sources: Mapping[str, str]


def sampling(model: str | Path) -> Sampling:
    """The settings of a preset or a model folder; those of its own files win over its preset's, these over its
    family's."""
    name, found = str(model), preset_of(model)
    layers = [family_default(model)]
    layers += [(preset_file(found), preset(found)["inference"])] if found else []
    where, own = ("", None) if name in presets() else own_shift(Path(model))
    layers += [(where, {"shift": own})] if own is not None else []
    layers += [] if name in presets() else own_guidance(Path(model))
    if name not in presets() and (card := read_card(model)).get("clips"):
        layers += [(str(Path(model) / "fastlightgen.json"), {"size": card["clips"]["size"]})]
    values = {key: value for _, settings in layers for key, value in settings.items()}
    sources = {key: source for source, settings in layers for key in settings}
    return Sampling(found, values, sources)


def training(model: str) -> list[Layer]:
    """(file, settings by section "stageN") that hold for training with a model folder; later ones win.

    They are those of its preset. The scheduler's shift replaces the preset's unless the preset was made for it, or a
    converter wrote it: then the preset also knows the shift that suits a student. [] for a folder that holds no known
    network.
    """
    try:
        found, (default, settings) = preset_of(model), family_default(model)
    except ValueError:  # the stage reports it
        return []
    known = preset(found) if found else {}
    where, shift = own_shift(Path(model))
    if shift is None or not where.endswith(SCHEDULER):  # the shift in a card is that of an earlier training
        where, shift = (default, settings["shift"]) if not known else ("", known["inference"]["shift"])
    layers: list[Layer] = [(preset_file(found), known)] if known else []
    if not known or shift not in (known["inference"]["shift"], family_of(config_of(model)).converted_shift):
        layers.append((where, {f"stage{n}": {"shift": shift} for n in range(4)}))
    return layers


def preset_of(model: str | Path) -> str:
    """The preset with the network of a preset or a model folder; "" if there is none."""
    if str(model) in presets():
        return str(model)
    network, (_, own) = comparable(config_of(model)), own_shift(Path(model))
    two = bool(experts_of(model) or expert_of(model))
    same = [name for name in presets() if network == network_of(name) and two == bool(experts_of(name))]
    return min(same, key=lambda name: preset(name)["inference"]["shift"] != own, default="")


def family_default(model: str | Path) -> Layer:
    """The settings of the family of a preset or a model folder."""
    config = config_of(model)
    family = family_of(config)
    return f"the default of {family.title}", family.settings(config).released | {"size": family.clips.size}


def own_shift(folder: Path) -> tuple[str, float | None]:
    """The time shift in a folder's files, after the file's name: of a trained model's card, else of the scheduler."""
    if shift := read_card(folder).get("shift"):
        return str(folder / "fastlightgen.json"), shift
    path = folder / SCHEDULER
    settings = read_json(path) if path.is_file() else {}
    return str(path), settings.get("flow_shift") or settings.get("shift")


def own_guidance(folder: Path) -> list[Layer]:
    """The guidance that a part of a pipeline holds, after the name of its file; [] if there is no such part."""
    path = folder / family_of(config_of(folder)).guider / GUIDER_CONFIG
    scale = read_json(path, GUIDER).get("guidance_scale") if path.is_file() else None
    return [] if scale is None else [(str(path), {"guidance": scale})]


def preset_file(name: str) -> str:
    return f"configs/model/{name}.yaml"


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A complete configuration as JSON has it, where tuples are lists."""
    return json.loads(json.dumps(config))


@cache
def network_of(name: str) -> dict[str, Any]:
    """The complete configuration of a preset's network."""
    return comparable(config_of(name))
