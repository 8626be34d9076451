"""Configuration on disk: the presets of the package, reading and writing YAML, and the comparison of two runs."""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from fastlightgen.config.fields import ConfigError, show
from fastlightgen.files import border


def config_root() -> Path:
    """The folder configs/: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def presets(kind: str = "model") -> list[str]:
    """Names that `model=` or `data=` accepts besides a folder."""
    return sorted(path.stem for path in (config_root() / kind).glob("*.yaml"))


def preset(name: str, kind: str = "model") -> dict[str, Any]:
    """The content of a preset; of a model: network, inference, settings of stages and methods; of data: the clips."""
    if name not in presets(kind):
        raise ConfigError(f"{kind}={name}: no such preset; there are {', '.join(presets(kind))}")
    return read_yaml(config_root() / kind / f"{name}.yaml")


def repositories() -> dict[str, str]:
    """Preset -> the repository of the Hugging Face Hub with the released model, as owner/name."""
    found = {name: preset(name).get("repository", "") for name in presets()}
    return {name: repository for name, repository in found.items() if repository}


def built_in(model: str) -> bool:
    """True for the presets of the built-in world's networks, False for those of released networks and for folders."""
    return model in presets() and model.startswith("tiny")


def recipe(name: str) -> dict[str, Any]:
    """The settings per stage of preset=NAME; {} for the default, whose settings are those of configs/stageN.yaml."""
    return preset(name, "preset") if name in presets("preset") else {}


def find_preset_weights(name: str) -> Path | None:
    """The folder with trained weights that ships with a model preset, if there is one."""
    folder = config_root() / "model" / name
    return folder if name in presets() and (folder / "config.json").is_file() else None  # `name` may be a path


class _Dumper(yaml.SafeDumper):
    """Writes a list on one line, as a user types it."""


# YAML takes these for the end of a line, also within quotes, unless they are escaped.
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
_Dumper.add_representer(
    str, lambda d, v: d.represent_scalar("tag:yaml.org,2002:str", v, style='"' if _LINE_ENDS.search(v) else None)
)
_Dumper.add_representer(list, lambda d, v: d.represent_sequence("tag:yaml.org,2002:seq", v, flow_style=True))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = border.read_yaml(path, "give the path of a YAML file")
    except ValueError as err:
        raise ConfigError(str(err)) from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path}: holds {type(content).__name__}; wanted lines of the form key: value")
    return content or {}


def to_yaml(cfg: Any) -> str:
    """The resolved configuration as YAML for `config=`; without dry_run, so that the file starts a run."""
    values = dataclasses.asdict(cfg)
    del values["dry_run"]
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def numbers(cfg: Any) -> dict[str, Any]:
    """The part of a configuration that decides what a run computes: no folder, no logging, no device."""
    out = {}
    for f in dataclasses.fields(cfg):
        if f.metadata["numbers"]:
            value = getattr(cfg, f.name)
            out[f.name] = numbers(value) if dataclasses.is_dataclass(value) else value
    return out


def fingerprint(cfg: Any) -> str:
    """Equal for two configurations exactly when their `numbers` are equal."""
    return hashlib.sha256(json.dumps(numbers(cfg), sort_keys=True).encode()).hexdigest()[:16]


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """{"stage2": {"lr": 1}} as {"stage2.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        if twice := out.keys() & nested.keys():
            raise ConfigError(f"{min(twice)} is given twice: keep one")
        out |= nested
    return out


def diff(cfg_a: dict, cfg_b: dict) -> list[str]:
    """What changed between two configurations, one readable "key: old -> new" per key."""
    old, new = flatten(cfg_a), flatten(cfg_b)
    keys = [key for key in old | new if old.get(key, ...) != new.get(key, ...)]
    return [f"{k}: {show(old[k]) if k in old else '(none)'} -> {show(new[k]) if k in new else '(none)'}" for k in keys]
