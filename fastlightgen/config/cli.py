"""From a command line to a checked configuration; how a command starts, and how it reports an error.

Later layers win: dataclass defaults, configs/stageN.yaml, configs/preset/NAME.yaml (preset=NAME),
configs/method/NAME.yaml, the model preset's section, config=FILE, the command line.
"""

import dataclasses
import difflib
import os.path
import sys
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.fields import ConfigError
from fastlightgen.config.files import presets, to_yaml
from fastlightgen.config.help import help_text
from fastlightgen.config.layers import assign, leaves, shipped_layers
from fastlightgen.config.plan import PLANNED, plan_root
from fastlightgen.config.recipes import file_keys
from fastlightgen.config.stages import CHOOSES, DEFAULT, STAGES, root

REQUEUE = 75  # exit code of a run that a scheduler stopped, to be started again (EX_TEMPFAIL)
MODELS = ("model", "teacher", "init", "stage2_model")  # keys that name a model: a preset or a folder


def load(argv: Sequence[str], command: str = "train") -> Any:
    """The configuration that `key=value` words describe; a word that is wrong raises a ConfigError of one line."""
    if {"-h", "--help"} & set(argv):
        print(help_text(command, argv))
        raise SystemExit(0)
    given = parse(argv)
    file = given.pop("config", None)
    if file == "":
        raise ConfigError("config= is empty; give the path of a YAML file")
    from_file = file_keys(file, command, given) if file is not None else {}
    cls = pick_root(command, from_file | given)
    node = OmegaConf.structured(cls)
    for where, values in shipped_layers(cls, from_file | given):
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


def pick_root(command: str, given: dict[str, Any]) -> type:
    """The class whose fields are the keys of this command, by the stage and the method that are given."""
    if command not in ("train", "plan"):
        return COMMANDS[command]
    if command == "plan":
        stage = str(given.get("stage", "3"))
        return plan_root(stage, str(given.get("method", DEFAULT))) if stage in PLANNED else plan_root()
    choices = "; ".join(f"stage={name}: {about}" for name, about in STAGES.items())
    if "stage" not in given:
        raise ConfigError(f"stage is required; {choices}")
    stage = str(given["stage"])
    if stage not in STAGES:
        raise ConfigError(f"stage={stage}: there is no such stage; {choices}")
    keys = {f"stage{n}.method": n for n in CHOOSES} if stage == "all" else {"method": stage} if stage in CHOOSES else {}
    return root(stage, {n: str(given[key]) for key, n in keys.items() if key in given})


def build(node: DictConfig, cls: type) -> Any:
    """The dataclass, after a check that no required key is missing; making it runs the checks across keys."""
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
    """Refuse a value that names neither a preset nor a folder."""
    if value in presets(kind) or os.path.isdir(value):
        return
    near = difflib.get_close_matches(value, presets(kind), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{key}={value}: neither a folder nor a preset ({', '.join(presets(kind))}){hint}")


def main(fn: Callable[[Any], None], command: str = "train", argv: Sequence[str] | None = None) -> None:
    """Run a command. A mistake of the user becomes one line and exit code 2; FLG_DEBUG=1 shows the traceback."""
    try:
        try:
            cfg = load(sys.argv[1:] if argv is None else argv, command)
        except ValueError:
            if os.environ.get("RANK", "0") != "0":  # all processes have the same mistake: rank 0 reports it
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
    """2: a mistake of the user; 75: stopped by a scheduler; 130: stopped by Ctrl-C."""
    if not isinstance(err, KeyboardInterrupt):
        return 2
    return REQUEUE if getattr(err, "requeue", False) else 130
