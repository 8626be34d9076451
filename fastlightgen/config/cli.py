"""From the words of a command line to a checked configuration; the help; and how a command starts and fails.

Later layers win: dataclass defaults, configs/stageN.yaml, the model preset's section, config=FILE, the command line.
"""

import dataclasses
import difflib
import os.path
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.fields import REQUIRED, ConfigError, check_value, default_of, limits, show
from fastlightgen.config.files import config_root, flatten, preset, presets, read_yaml, to_yaml
from fastlightgen.config.run import Run
from fastlightgen.config.schema import STAGES, StageAll

TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text", list[float]: "[number,number]"}
REQUEUE = 75  # exit code of a run that a scheduler stopped, to be started again (EX_TEMPFAIL)
MODELS = ("model", "teacher", "init", "stage2_model")  # keys that name a model: a preset or a folder


def load(argv: Sequence[str], command: str = "train") -> Any:
    """The configuration that `key=value` words describe; ConfigError, in one line, if they do not."""
    if {"-h", "--help"} & set(argv):
        print(help_text(command, argv))
        raise SystemExit(0)
    given = parse(argv)
    file = given.pop("config", None)
    if file == "":
        raise ConfigError("config= is empty; give the path of a YAML file")
    from_file = flatten(read_yaml(file)) if file is not None else {}
    cls = pick_root(command, given.get("stage", from_file.get("stage")))
    node = OmegaConf.structured(cls)
    for where, values in shipped_layers(cls, given.get("model", from_file.get("model"))):
        assign(node, cls, values, f" (in {where})")
    assign(node, cls, from_file, f" (in {file})")
    assign(node, cls, given, "")
    cfg = build(node, cls)
    for key in leaves(cls):
        name, value = key.rpartition(".")[2], OmegaConf.select(node, key)
        if name in (*MODELS, "data") and value:
            check_place(key, value, "data" if name == "data" else "model")
    return cfg


def parse(argv: Sequence[str]) -> dict[str, str]:
    """["lr=1e-4", ...] as {"lr": "1e-4", ...}."""
    given: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(
                f"{word}: keys have no dashes; write {key.lstrip('-').replace('-', '_')}={value or 'VALUE'}"
            )
        if not (key and equals):
            raise ConfigError(f"{word!r}: wanted key=value, for example seed=1 (--help lists the keys)")
        if key in given:
            raise ConfigError(f"{key} is given twice, as {key}={given[key]} and {key}={value}: keep one")
        given[key] = value
    return given


def pick_root(command: str, stage: Any) -> type:
    """The class whose fields are the keys of this command."""
    if command != "train":
        return COMMANDS[command]
    choices = "; ".join(f"stage={name}: {cls.__doc__}" for name, cls in STAGES.items())
    if stage is None:
        raise ConfigError(f"stage is required; {choices}")
    if str(stage) not in STAGES:
        raise ConfigError(f"stage={stage}: there is no such stage; {choices}")
    return STAGES[str(stage)]


def shipped_layers(cls: type, model: Any) -> list[tuple[str, dict[str, Any]]]:
    """(file, settings) that come with the package for this stage, or for each section of stage=all."""
    if cls not in STAGES.values():
        return []
    model = default_of(leaves(cls)["model"]) if model is None else str(model)
    network = preset(model) if model in presets() else {}
    out = []
    for name in ("stage1", "stage2", "stage3") if cls is StageAll else (f"stage{default_of(leaves(cls)['stage'])}",):
        prefix = f"{name}." if cls is StageAll else ""
        out.append((f"configs/{name}.yaml", flatten(read_yaml(config_root() / f"{name}.yaml"), prefix)))
        out.append((f"configs/model/{model}.yaml", flatten(network.get(name, {}), prefix)))
    return out


def leaves(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every key of a root class, those of its sections with a dot."""
    out = {}
    for f in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(f.type)
        out |= leaves(f.type, f"{prefix}{f.name}.") if nested else {f"{prefix}{f.name}": f}
    return out


def assign(node: DictConfig, cls: type, values: dict[str, Any], where: str) -> None:
    """Put one layer's values into the configuration, each checked by itself."""
    known = leaves(cls)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(unknown_key(key, value, cls) + where)
        f = known[key]
        wanted = ConfigError(f"{key}={show(value)}: wanted {TYPES[f.type]}, for example {key}={example(f)}{where}")
        try:
            OmegaConf.update(node, key, literal(value, f.type))
            check_value(f, plain(OmegaConf.select(node, key, throw_on_missing=True)), key)
        except ConfigError as err:
            raise ConfigError(f"{err}{where}") from None
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, OverflowError):
            raise wanted from None


def literal(value: Any, kind: type) -> Any:
    """A value as OmegaConf has to see it, so that text stays what it is: no ${...} lookup, no "yes" for true."""
    if isinstance(value, str) and kind == list[float]:
        value = yaml.safe_load(value)
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
    """Why a key cannot be used here, and which key was probably meant."""
    known, told = leaves(cls), f"{key}={show(value)}"
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{told}: {key} is a section; give {inside[0]}=... or another of its keys"
    sections = [name for name in known if name.endswith(f".{key}")]
    if sections:
        return f"{told}: set it for one part of stage=all: {', '.join(f'{name}=...' for name in sections)}"
    others = [f"stage={name}" for name, other in STAGES.items() if key in leaves(other)]
    if cls in STAGES.values() and others:
        return f"{told}: {key} is a key of {', '.join(others)}, not of stage={default_of(known['stage'])}"
    near = difflib.get_close_matches(key.lower(), known, n=1)
    return f"{told}: unknown key; " + (f"did you mean {near[0]}?" if near else "--help lists the keys")


def build(node: DictConfig, cls: type) -> Any:
    """The dataclass itself, once nothing is missing; building it runs the checks across keys."""
    for key in OmegaConf.missing_keys(node):
        raise ConfigError(f"{key} is required ({leaves(cls)[key].metadata['help']}): give {key}=...")
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            try:
                OmegaConf.to_object(node[f.name])
            except ConfigError as err:
                raise ConfigError(f"{f.name}.{err}") from None
    return OmegaConf.to_object(node)


def check_place(key: str, value: str, kind: str) -> None:
    """`value` names a preset or an existing folder."""
    if value in presets(kind) or os.path.isdir(value):
        return
    near = difflib.get_close_matches(value, presets(kind), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{key}={value}: neither a folder nor a preset ({', '.join(presets(kind))}){hint}")


def help_text(command: str, argv: Sequence[str]) -> str:
    """Every key with its type, default and meaning; with stage=N only those of that stage."""
    given = dict(word.split("=", 1) for word in argv if "=" in word)
    usage = f"usage: python -m fastlightgen.{command} {'stage=STAGE ' if command == 'train' else ''}key=value ..."
    head = [usage, "", "Also config=FILE.yaml: keys from a file; the command line wins."]
    if command != "train":
        return "\n".join([*head, "", f"Keys ({COMMANDS[command].__doc__}):", *describe(COMMANDS[command], None)])
    model, stage = given.get("model", default_of(leaves(Run)["model"])), given.get("stage")
    text = [*head, f"The defaults are those of model={model}.", ""]
    text += [f"stage={name:<4} {cls.__doc__}" for name, cls in STAGES.items()]
    text += ["", "Keys of every stage:", *describe(Run, None)]
    for name, cls in STAGES.items():
        if stage in (name, None) or stage not in STAGES:
            text += ["", f"Keys of stage={name} ({cls.__doc__}):"]
            lines, common = describe(cls, model), len(leaves(Run))
            # without a stage the sections of stage=all would repeat what stands above
            short = cls is StageAll and stage != "all"
            text += ["  stage1.KEY, stage2.KEY, stage3.KEY: the keys above"] if short else []
            text += [line for line in lines[common:] if not (short and line.startswith("  stage"))]
    return "\n".join(text)


def describe(cls: type, model: str | None) -> list[str]:
    """One line per key; the defaults are those that hold before config=FILE and the command line."""
    node = OmegaConf.structured(cls)
    for where, values in shipped_layers(cls, model):
        assign(node, cls, values, f" (in {where})")
    lines = []
    for key, f in leaves(cls).items():
        value, meaning = plain(OmegaConf.select(node, key)), f.metadata["help"]
        default = "required" if value is None else show(value) or '""'
        named = f.metadata["choices"] and all(c in meaning for c in f.metadata["choices"])
        meaning += f" ({limits(f)})" if limits(f) and not named else ""
        lines.append(f"  {key:<22} {TYPES[f.type]:<16} {default:<12} {meaning}")
    return lines


def main(fn: Callable[[Any], None], command: str = "train", argv: Sequence[str] | None = None) -> None:
    """Run a command. What a user can mend is one line and exit code 2; FLG_DEBUG=1 shows where it came from."""
    try:
        try:
            cfg = load(sys.argv[1:] if argv is None else argv, command)
        except ValueError:
            if os.environ.get("RANK", "0") != "0":  # of several processes with one mistake the first one tells it
                sys.exit(2)
            raise
        if cfg.dry_run:
            print(to_yaml(cfg), end="")
        else:
            fn(cfg)
    except (ValueError, OSError) as err:  # ValueError is for users, `assert` for programmers
        if os.environ.get("FLG_DEBUG") == "1":
            raise
        sys.exit(report(err))
    except KeyboardInterrupt as stop:
        sys.exit(report(stop))


def report(err: BaseException) -> int:
    """Print one line about an error that a user can mend, or about an interruption; returns the exit code."""
    if isinstance(err, KeyboardInterrupt):
        print(str(err) or "interrupted", file=sys.stderr)
    else:
        print(f"error: {' '.join(str(err).split())}", file=sys.stderr)
    return exit_code(err)


def exit_code(err: BaseException) -> int:
    """2: something to mend; 75: stopped by a scheduler; 130: by Ctrl-C."""
    if not isinstance(err, KeyboardInterrupt):
        return 2
    return REQUEUE if getattr(err, "requeue", False) else 130
