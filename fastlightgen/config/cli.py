"""From a command line to a checked configuration, and how a command starts.

Later layers win: dataclass defaults, configs/stageN.yaml, configs/preset/NAME.yaml (preset=NAME),
configs/method/NAME.yaml, the model preset's sections, config=FILE, the command line.
"""

import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

import fastlightgen
from fastlightgen.config.commands import COMMANDS
from fastlightgen.config.errors import guarded, plain
from fastlightgen.config.fields import ConfigError, clipped
from fastlightgen.config.files import built_in, presets, repositories, to_yaml
from fastlightgen.config.help import ALL, front_page, help_text
from fastlightgen.config.layers import COMMAND_LINE, CONFIG, assign, leaves, shipped_layers
from fastlightgen.config.plan import PLANNED, plan_all_root, plan_root
from fastlightgen.config.recipes import file_keys
from fastlightgen.config.stages import CHOOSES, DEFAULT, STAGES, root

MODELS = ("model", "teacher", "init", "stage2_model")  # keys that name a model: a preset or a folder
LONGEST = 1_000  # characters of a value, so that every message that repeats it can be read
TEXTS = ("prompt", "null_prompt", "negative")  # keys whose values may hold any words


def load(argv: Sequence[str], command: str = "train") -> Any:
    """The configuration that `key=value` words describe; a word that is wrong raises a ConfigError of one line.

    `origins` of the result maps each key that is not at its default to what set it: a file, or COMMAND_LINE.
    """
    if {"-h", "--help"} & set(argv):
        print(help_page(argv, command), flush=True)
        raise SystemExit(0)
    if "--version" in argv:
        print(f"fastlightgen {fastlightgen.__version__}", flush=True)
        raise SystemExit(0)
    given, file, from_file = read_words(argv, command)
    cls = pick_root(command, from_file | given)
    layers = layers_of(cls, from_file | given, file, from_file)
    node = assigned(cls, layers)
    assign(node, cls, given, "")
    origins = {key: where for where, values in [*layers, (COMMAND_LINE, given)] for key in values}
    try:
        cfg = build(node, cls)
    except ConfigError as err:
        raise ConfigError(f"{err}{set_by(str(err), cls, origins)}") from None
    for key in leaves(cls):
        name, value = key.rpartition(".")[2], OmegaConf.select(node, key)
        if name in (*MODELS, "data") and value:
            check_place(key, value, "data" if name == "data" else "model")
        if name == "pipeline" and value and not os.path.isdir(value) and not built_in(value):
            raise ConfigError(f"{key}={clipped(value)}: there is no such folder{download(value)}")
    cfg.origins = origins | ({CONFIG: file} if file else {})
    return cfg


def set_by(error: str, cls: type, origins: Mapping[str, str]) -> str:
    """What set the key that an error is about, if it does not stand on the command line, else ""."""
    key = error.partition("=")[0]
    if key not in leaves(cls) or origins.get(key) == COMMAND_LINE:
        return ""
    return f" ({key} comes from {origins[key]})" if key in origins else f" ({key} has its default)"


def help_page(argv: Sequence[str], command: str) -> str:
    """The text of --help; keys beside it choose the stage, the method, the model and the file of the defaults."""
    given, file, from_file = read_words([word for word in argv if "=" in word], command)
    chosen, everything = from_file | given, ALL in argv
    if command == "train" and "stage" not in chosen:
        roots = {name: root(name) for name in STAGES if everything}
        return front_page({name: (cls, assigned(cls, layers_of(cls, chosen, None, {}))) for name, cls in roots.items()})
    cls = pick_root(command, chosen)
    node = assigned(cls, layers_of(cls, chosen, file, from_file))
    if "model" in leaves(cls) and chosen.get("model"):
        check_place("model", chosen["model"], "model")
    assign(node, cls, {key: given[key] for key in ("model", "preset") if key in given}, "")
    return help_text(command, (cls, node), chosen, everything)


def read_words(argv: Sequence[str], command: str) -> tuple[dict[str, str], str | None, dict[str, Any]]:
    """The keys of a command line, and the name and the keys of its config=FILE."""
    given = parse(argv)
    file = given.pop(CONFIG, None)
    if file == "":
        raise ConfigError("config= is empty; give the path of a YAML file")
    return given, file, file_keys(file, command, given) if file is not None else {}


def layers_of(
    cls: type, chosen: dict[str, Any], file: str | None, from_file: dict[str, Any]
) -> list[tuple[str, Mapping[str, Any]]]:
    """(file, its keys), the weakest first, without the command line; `chosen` names model, preset and method."""
    return [*shipped_layers(cls, chosen), (file or "", from_file)]


def assigned(cls: type, layers: Iterable[tuple[str, Mapping[str, Any]]]) -> DictConfig:
    """The values of all keys that the layers set."""
    node = OmegaConf.structured(cls)
    for where, values in layers:
        assign(node, cls, values, f" (in {where})")
    return node


def parse(argv: Sequence[str]) -> dict[str, str]:
    """["lr=1e-4", ...] as {"lr": "1e-4", ...}."""
    given: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            written = clipped(f"{key.lstrip('-').replace('-', '_')}={value or 'VALUE'}")
            raise ConfigError(f"{clipped(word)}: keys have no dashes; write {written}")
        if not (key and equals):
            raise ConfigError(f"{clipped(word)!r}: wanted key=value, for example seed=1 (--help lists the keys)")
        if key not in TEXTS and len(value) > LONGEST:
            raise ConfigError(f"{clipped(key)}={clipped(value)}: has {len(value)} characters, wanted {LONGEST} at most")
        if key not in TEXTS and (second := re.search(r"\s([a-z][\w.]*)=", value)):
            raise ConfigError(
                f"{key}={clipped(value)!r}: holds {clipped(second[0])!r}: the shell passed several words as one, as "
                f"zsh does with $T; write the words out, {key}=... {clipped(second[1])}=..."
            )
        if key in given:
            both = " and ".join(f"{key}={text}" for text in map(clipped, (given[key], value)))
            raise ConfigError(f"{clipped(key)} is given twice, as {both}: keep one")
        given[key] = value
    return given


def pick_root(command: str, given: dict[str, Any]) -> type:
    """The class whose fields are the keys of this command, by the stage and the method that are given."""
    if command not in ("train", "plan"):
        return COMMANDS[command]
    if command == "plan":
        stage = str(given.get("stage", "3"))
        if stage == "all":
            return plan_all_root(methods_in(stage, given))
        if stage == "decoder":
            raise ConfigError(
                "stage=decoder: a decoder has no plan, because one GPU is enough; start train stage=decoder, "
                "whose bar shows the time that is left"
            )
        return plan_root(stage, str(given.get("method", DEFAULT))) if stage in PLANNED else plan_root()
    *numbered, last = STAGES
    choices = f"give stage={', '.join(numbered)} or {last} (train --help says what each does)"
    if "stage" not in given:
        known = dict.fromkeys(k for name in STAGES for k in leaves(root(name)))
        if near := difflib.get_close_matches("stage", [key for key in given if key not in known], n=1):
            raise ConfigError(f"{near[0]}={given[near[0]]}: unknown key; did you mean stage?")
        raise ConfigError(f"stage is required; {choices}")
    stage = str(given["stage"])
    if stage not in STAGES:
        raise ConfigError(f"stage={stage}: there is no such stage; {choices}")
    return root(stage, methods_in(stage, given))


def methods_in(stage: str, given: dict[str, Any]) -> dict[str, str]:
    """Stage -> the name of its method, where one is given."""
    keys = {f"stage{n}.method": n for n in CHOOSES} if stage == "all" else {"method": stage} if stage in CHOOSES else {}
    return {n: str(given[key]) for key, n in keys.items() if key in given}


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
    hint = download(value) or (f"; did you mean {near[0]}?" if near else "")
    if os.path.dirname(value) and not os.path.exists(value):  # a path, and no name of a preset
        raise ConfigError(f"{key}={clipped(value)}: there is no such folder{hint}")
    raise ConfigError(f"{key}={clipped(value)}: neither a folder nor a preset ({', '.join(presets(kind))}){hint}")


def download(value: str) -> str:
    """How to download the model that a value names, if it is on the Hugging Face Hub; else "".

    Known are the names of the presets' repositories, with or without owner; others have the form owner/name.
    """
    name = os.path.basename(os.path.normpath(value))
    for model, repository in repositories().items():
        own = repository.rpartition("/")[2]
        if name == own or value == model:
            folder = value if name == own and value != repository else own
            return f"; download it first: hf download {repository} --local-dir {shlex.quote(folder)}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value) or os.path.isdir(os.path.dirname(value)):
        return ""
    return f"; if it is a model of the Hugging Face Hub, download it first: hf download {value} --local-dir {name}"


def main(
    fn: Callable[[Any], None],
    command: str = "train",
    argv: Sequence[str] | None = None,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Run a command with the keys of the command line; `check` raises what dry_run=true is to warn of."""

    def work() -> None:
        try:
            cfg = load(sys.argv[1:] if argv is None else argv, command)
        except ValueError:
            if os.environ.get("RANK", "0") != "0":  # all processes have the same mistake: rank 0 reports it
                sys.exit(2)
            raise
        if cfg.dry_run:
            print(to_yaml(cfg), end="", flush=True)
            try:
                (check or (lambda cfg: None))(cfg)
            except (ValueError, OSError) as err:
                print(f"warning: this would stop at once: {plain(str(err))}", file=sys.stderr)
        else:
            fn(cfg)

    guarded(work)
