"""Which network a preset, a config.json or a model folder means, without its weights."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch

from fastlightgen.config import find_preset_weights, preset, presets
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.files import read_json
from fastlightgen.models.hunyuan import HunyuanConfig, HunyuanModel
from fastlightgen.models.original import BY_ORIGINAL, from_original
from fastlightgen.models.wan import WanConfig, WanModel

NETWORKS = {  # _class_name of config.json
    WanModel.config_class: (WanConfig, WanModel),
    HunyuanModel.config_class: (HunyuanConfig, HunyuanModel),
}


def build(config: Mapping, seed: int | None = None) -> VideoDiT:
    """A network from a diffusers config; random weights are drawn from `seed`."""
    cfg, network = settings(config)
    if seed is None:
        return network(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(cfg)


def settings(config: Mapping) -> tuple[WanConfig | HunyuanConfig, type[VideoDiT]]:
    """A diffusers config, with defaults for what it leaves out, and the class that takes it."""
    name = config.get("_class_name", WanModel.config_class)
    if name not in NETWORKS:
        raise ValueError(f"config.json: _class_name is {name!r}; supported: {', '.join([*NETWORKS, *BY_ORIGINAL])}")
    kind, network = NETWORKS[name]
    check_config(config, kind)
    return kind(**{f.name: config[f.name] for f in fields(kind) if f.name in config}), network


def config_of(path_or_preset: str | Path) -> dict:
    """The complete diffusers config of a preset or a model folder, without its weights."""
    name = str(path_or_preset)
    config = preset(name)["network"] if name in presets() else read_config(model_folder(path_or_preset))
    cfg, network = settings(config)
    return {"_class_name": network.config_class} | asdict(cfg)


def check_config(config: Mapping, kind: type) -> None:
    """No key that the network does not know (diffusers' own notes start with _), and whole numbers where sizes are."""
    defaults = {f.name: f.default for f in fields(kind)}
    for key, value in config.items():
        if key not in defaults and not key.startswith("_") and value is not None:
            raise ValueError(
                f"config.json: {key}={value!r} is not a key of this network; remove it if the weights do without it"
            )
        least = 0 if key.endswith("_layers") else 1  # a student may have lost all its single blocks
        if type(defaults.get(key)) is int and not (type(value) is int and value >= least):
            raise ValueError(f"config.json: {key} is {value!r}; wanted a whole number from {least} up")


def model_folder(path: str | Path) -> Path:
    """The folder with config.json and weights: `path`, or transformer/ in a pipeline folder."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model_index.json").is_file():
        if (folder / "transformer_2").is_dir():
            raise ValueError(f"{folder}: has a transformer_2; give the folder of one of its two networks")
        if (folder / "transformer" / "config.json").is_file():
            return folder / "transformer"
        raise ValueError(f"{folder}: a pipeline without transformer/config.json; give one with a video transformer")
    raise ValueError(f"model={path}: neither a folder with config.json nor a preset ({', '.join(presets())})")


def read_config(folder: Path) -> dict:
    """config.json of a model folder in diffusers' terms, whichever format it is in."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: holds {type(config).__name__}; wanted the keys of a network")
    return from_original(config) if config.get("_class_name") in BY_ORIGINAL else config


def trained_folder(path_or_preset: str) -> Path:
    """The folder with trained weights that `model=` means: itself, or the weights shipped for a preset."""
    if path_or_preset not in presets():
        return Path(path_or_preset)
    folder = find_preset_weights(path_or_preset)
    if folder is None:
        raise ValueError(
            f"model={path_or_preset}: this preset has no weights here; give a model folder or train one with stage=0"
        )
    return folder
