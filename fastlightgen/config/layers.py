"""Layers of a configuration: the keys of a root class, and the values of one layer after the other, each checked."""

import dataclasses
import difflib
import importlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastlightgen.config.fields import REQUIRED, ConfigError, check_value, clipped, default_of, show, type_of
from fastlightgen.config.files import config_root, flatten, preset, presets, read_yaml, recipe
from fastlightgen.config.stages import DEFAULT, METHODS, STAGES, keys_of, root
from fastlightgen.files.border import parsed_yaml

COMMAND_LINE, CONFIG = "the command line", "config"  # in `origins`: the source of given words, the key of config=FILE
STARTS = ("init", "teacher", "model")  # keys that name the network a stage starts from; the first one given does
RELEASED = "fastlightgen.models.folder.released"
LONGEST = 200  # characters of two numbers
CALLED = {"size": "buckets"}  # key of other commands -> the key of `encode` with the same purpose
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", list[float]: "[number,number]"}


def sections(cls: type) -> dict[str, str]:
    """Stage -> prefix of its keys in a root class; empty for commands without a stage."""
    stage = default_of(leaves(cls)["stage"]) if "stage" in leaves(cls) else ""
    return {n: f"stage{n}." for n in ("1", "2", "3")} if stage == "all" else {stage: ""} if stage else {}


def shipped_layers(cls: type, given: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(file, settings) that come with the package for the stages of a root class; later ones win.

    `given` may hold the keys of STARTS and `preset`. The files hold the settings of the default method; another one
    takes those that it knows, has a file of its own, and may stand under `methods` in the model's file.
    """
    known, out = leaves(cls), list[tuple[str, dict[str, Any]]]()
    model, chosen = (str(given.get(k, default_of(known[k]) if k in known else "")) for k in ("model", "preset"))
    if "run" in known and "stage" in known and default_of(known["run"]) == REQUIRED:  # `report` must be given its run
        out.append(("named after the model", {"run": default_run(model or str(given.get("vae", "small-decoder")))}))
    model = next((str(given[key]) for key in STARTS if key in known and given.get(key)), model)
    numbers, networks = recipe(chosen), model_layers(model)
    for stage, prefix in sections(cls).items():
        method = default_of(known[f"{prefix}method"]) if f"{prefix}method" in known else DEFAULT
        shipped = {f"configs/method/{method}.yaml": optional(config_root() / "method" / f"{method}.yaml")}
        tuned = {f"{where}, methods.{method}": c.get("methods", {}).get(method, {}) for where, c in networks}
        own = shipped | tuned  # of the method alone, so that every key must be one of its keys
        layers = {
            f"configs/stage{stage}.yaml": optional(config_root() / f"stage{stage}.yaml"),
            f"configs/preset/{chosen}.yaml": numbers.get(f"stage{stage}", {}),
        }
        layers |= shipped | {where: content.get(f"stage{stage}", {}) for where, content in networks} | tuned
        for where, values in layers.items():
            settings = flatten(values, prefix)
            if method != DEFAULT and where not in own:
                settings = {key: value for key, value in settings.items() if key in known}
            out.append((where, settings))
    return out


def optional(file: Path) -> dict[str, Any]:
    """The content of a YAML file, or {} if there is none."""
    return read_yaml(file) if file.is_file() else {}


def default_run(model: str) -> str:
    """runs/NAME of a preset or a folder; a network inside a run or a pipeline has the name of that folder."""
    folder = Path(os.path.abspath(model))
    while re.fullmatch(r"model|transformer|vae|decoder|stage\d", folder.name):
        folder = folder.parent
    return f"runs/{folder.name}"


def settings_from(cls: type, given: Mapping[str, Any]) -> str:
    """The shipped files that set a root class's keys, the strongest first; says so if no preset fits the model."""
    layers = shipped_layers(cls, given)
    files = [where for where, values in reversed(layers) if values and set(values) != {"run"}]
    if len(sections(cls)) > 1:
        files = [re.sub(r"/stage\d", "/stageN", file) for file in files]
    models = [where.removeprefix("configs/model/").removesuffix(".yaml") for where, _ in layers]
    fits = any(name in presets() for name in models)
    model = given.get("model", default_of(leaves(cls)["model"]))
    return " over ".join(dict.fromkeys(files)) + ("" if fits else f"; no preset fits model={model}")


def model_layers(model: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(file, content with sections "stageN") of `model=`: its preset's; for a folder see models/folder/released.py."""
    if model in presets():
        return [(f"configs/model/{model}.yaml", preset(model))]
    # By name, because the registry of families stands above this file and loads torch.
    return importlib.import_module(RELEASED).training(model) if os.path.isdir(model) else []


def leaves(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Key -> field of a root class; the keys of a section have its name and a dot in front."""
    out: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        out |= leaves(type_of(f), f"{prefix}{f.name}.") if nested else {f"{prefix}{f.name}": f}
    return out


def assign(node: DictConfig, cls: type, values: Mapping[str, Any], where: str) -> None:
    """Put one layer's values into the configuration, each checked by itself."""
    known = leaves(cls)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(unknown_key(key, value, cls) + where)
        f = known[key]
        wanted = ConfigError(
            f"{key}={clipped(show(value))}: wanted {TYPES[type_of(f)]}, for example {key}={example(f)}{where}"
        )
        try:
            OmegaConf.update(node, key, literal(value, type_of(f)))
            check_value(f, plain(OmegaConf.select(node, key, throw_on_missing=True)), key)
        except ConfigError as err:
            raise ConfigError(f"{err}{where}") from None
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError):
            raise wanted from None


def misfit(cls: type, key: str, value: Any) -> str:
    """Why a root class takes no such key, or not this value, whatever the other keys are; "" if it takes it."""
    try:
        assign(OmegaConf.structured(cls), cls, {key: value}, "")
    except ConfigError as err:
        return str(err)
    return ""


def literal(value: Any, kind: type) -> Any:
    """A value in the form in which OmegaConf leaves it alone: no lookup of ${...}, no "yes" for true."""
    if isinstance(value, str) and kind == list[float]:
        if len(value) > LONGEST:  # the parser calls itself for every bracket
            raise TypeError
        value = parsed_yaml(value, "")
    if kind == list[float]:
        if not isinstance(value, list):
            raise TypeError
        value = [float(part) if isinstance(part, str) else part for part in value]  # to YAML 1e-3 is a text
    if kind is bool and str(value).lower() not in ("true", "false"):
        raise TypeError
    if isinstance(value, str):
        value = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def example(f: dataclasses.Field) -> str:
    default = default_of(f)
    return show(default) if default not in (REQUIRED, "") else "NAME"


def unknown_key(key: str, value: Any, cls: type) -> str:
    """The error for an unknown key: where the key would be valid, or which key the user probably meant."""
    known, key = leaves(cls), clipped(key)
    shown = f"{key}={clipped(show(value))}"
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{shown}: {key} is a section; give {inside[0]}=... or another of its keys"
    parts = [name for name in known if name.endswith(f".{key}")]
    if parts:
        return f"{shown}: set it for one part of stage=all: {', '.join(f'{name}=...' for name in parts)}"
    here = sections(cls)
    stage = default_of(known["stage"]) if here else ""
    for own in here:  # another method of the same stage
        methods = [f"method={name}" for name in METHODS[own] if key in leaves(keys_of(own, name))]
        if methods:
            return f"{shown}: {key} is a key of {', '.join(methods)}, not of method={default_of(known['method'])}"
    section, _, name = key.rpartition(".")
    if stage == "all" and name in known:
        return f"{shown}: {name} is one key for all stages; give {name}=..."
    if stage == "all" and section in ("stage1", "stage2", "stage3", "evaluate"):
        if parts := [k for k in known if k.endswith(f".{name}")]:
            return f"{shown}: {section} has no {name}; give {' or '.join(f'{k}=...' for k in parts)}"
    if others := stages_with(key) if here else []:
        elsewhere = "" if section == f"stage{stage}" else f" to stage={section[5:]}, or type stage=all"
        remedy = f"; give {name}=...{elsewhere}" if section in ("stage1", "stage2", "stage3") else ""
        return f"{shown}: {key} is a key of {', '.join(others)}, not of stage={stage}{remedy}"
    return f"{shown}: unknown key; {suggestion(key, known, stage)}"


def stages_with(key: str) -> list[str]:
    return [f"stage={name}" for name in STAGES if key in leaves(root(name))]


def suggestion(key: str, known: Collection[str], stage: str) -> str:
    """The remedy for a mistyped key: the known key nearest to it, or that of another stage, if one is near.

    The names behind the dots are compared, because a section would make all of its keys look alike.
    """
    section, _, name = key.lower().rpartition(".")
    if section in known:
        return f"did you mean {section}?"
    if CALLED.get(name) in known:
        return f"did you mean {CALLED[name]}?"
    elsewhere = dict.fromkeys(k for n in STAGES for k in leaves(root(n)) if "." not in k) if stage else {}
    last = {k: k.rpartition(".")[2] for k in [*known, *elsewhere]}
    near = difflib.get_close_matches(name, set(last.values()), n=1)
    own = [k for k in known if last[k] in near]
    if own:  # of several sections the one that was meant, if that can be seen
        likeness = {k: difflib.SequenceMatcher(None, key.lower(), k).ratio() for k in own}
        return f"did you mean {' or '.join(k for k in own if likeness[k] == max(likeness.values()))}?"
    if near:
        return f"did you mean {near[0]}, a key of {', '.join(stages_with(near[0]))}?"
    return "--help lists the keys"
