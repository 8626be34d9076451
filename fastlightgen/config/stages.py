"""The stages of `train` and their methods: which module declares each, and which keys a configuration has.

A method is one module with a record METHOD: its name, one line about it, the dataclass of its keys, how it is built and
which walks it takes. This file knows the modules by name only. They load torch, so each is imported when it is asked
for; `register` adds a method from outside.
"""

import importlib
from dataclasses import asdict, fields, make_dataclass
from functools import cache
from typing import Any, Protocol

from fastlightgen.config.commands import EvaluateKeys
from fastlightgen.config.fields import Checked, ConfigError, field, section, with_default
from fastlightgen.config.run import Run
from fastlightgen.config.training import BatchKeys

STAGES = {
    "0": "train a teacher by flow matching",
    "1": "rank the blocks and choose those to drop",
    "2": "train the network to work with and without the chosen blocks",
    "3": "distil the pruned network to a few sampling steps",
    "all": "stages 1, 2 and 3, then the evaluation and the report",
    "decoder": "prune the decoder of a VAE and fine-tune it on videos",
}
CHOOSES = ("2", "3")  # stages with a key `method`
DEFAULT = "fastlightgen"
# The keys of every stage that stage=decoder has too: those of a run in one process, without a network and a cache.
OF_DECODER = (
    "run seed device dtype micro_batch log_every save_every keep damaged keep_every alarms tensorboard wandb trackio "
    "overwrite threads progress dry_run"
).split()
METHOD_HELP = "which method the stage follows"


class Declared(Protocol):
    """The part of a method's record that this file reads."""

    @property
    def stage(self) -> str: ...  # "0" to "3", or "decoder"

    @property
    def name(self) -> str: ...  # method=NAME

    @property
    def about(self) -> str: ...  # one line for --help

    @property
    def keys(self) -> type[Checked]: ...


METHODS: dict[str, dict[str, str | Declared]] = {  # stage -> name -> the module that declares it, or its record
    "0": {DEFAULT: "fastlightgen.stages.teacher"},
    "1": {DEFAULT: "fastlightgen.stages.rank"},
    "2": {
        DEFAULT: "fastlightgen.stages.prune",
        "f3": "fastlightgen.methods.f3",
        "icmd": "fastlightgen.methods.icmd",
        "lightning": "fastlightgen.methods.lightning",
    },
    "3": {
        DEFAULT: "fastlightgen.stages.distill",
        "dmd2": "fastlightgen.methods.dmd2",
        "lcm": "fastlightgen.methods.lcm",
        "magicdistillation": "fastlightgen.methods.magicdistillation",
        "regression": "fastlightgen.methods.regression",
    },
    "decoder": {DEFAULT: "fastlightgen.stages.decoder"},
}


def register(method: Declared) -> None:
    """Add a method to its stage."""
    METHODS[method.stage][method.name] = method


def declared(stage: str, name: str = DEFAULT) -> Any:
    """The record of one method."""
    known = METHODS[stage]
    if name not in known:
        raise ConfigError(f"method={name}: stage={stage} has no such method; wanted one of {', '.join(known)}")
    entry = known[name]
    return importlib.import_module(entry).METHOD if isinstance(entry, str) else entry


def keys_of(stage: str, name: str = DEFAULT) -> type[Checked]:
    """The keys of a stage that follows this method; stages with a choice also have the key `method`."""
    keys = declared(stage, name).keys
    return with_method(keys, name, tuple(METHODS[stage])) if stage in CHOOSES else keys


@cache  # one class for equal arguments: configurations compare equal only within a class
def with_method(keys: type[Checked], name: str, names: tuple[str, ...]) -> type[Checked]:
    chosen = ("method", str, field(name, METHOD_HELP, choices=names, everyday=True))
    return make_dataclass(keys.__name__, [chosen], bases=(keys,), kw_only=True)


def root(stage: str, methods: dict[str, str] | None = None) -> type:
    """The class whose fields are the keys of `train stage=STAGE`; `methods`: stage -> name, if not the default."""
    chosen = methods or {}
    parts = ("1", "2", "3") if stage == "all" else (stage,)
    return _root(stage, tuple(keys_of(part, chosen.get(part, DEFAULT)) for part in parts))


@cache
def _root(stage: str, keys: tuple[type[Checked], ...]) -> type:
    own: list[Any] = [("stage", str, field(stage, "which stage to run", choices=(stage,)))]
    about = {"__doc__": STAGES[stage]}
    if stage == "decoder":
        own += [(f.name, f.type, with_default(f, f.default)) for f in fields(Run) if f.name in OF_DECODER]
        return make_dataclass("StageDecoder", own, bases=keys, kw_only=True, namespace=about)
    if stage != "all":
        return make_dataclass(f"Stage{stage}", own, bases=(*keys, Run), kw_only=True, namespace=about)
    own += [(f"stage{n}", k, section(k, f"keys of stage {n}")) for n, k in enumerate(keys, 1)]
    own += [("evaluate", EvaluateKeys, section(EvaluateKeys, "keys of the evaluation", numbers=False))]
    return make_dataclass("StageAll", own, bases=(Run,), kw_only=True, namespace=about)


class StageConfig(BatchKeys, Run):
    """The keys that every stage has; for type annotations."""


def for_stage(cfg: Any, stage: int) -> Any:
    """The configuration of one stage of `stage=all`."""
    part = getattr(cfg, f"stage{stage}")
    common = {f.name: getattr(cfg, f.name) for f in fields(Run) if f.name != "stage"}
    out = root(str(stage), {str(stage): method_of(part)})(**common, **asdict(part))
    out.origins = {key.removeprefix(f"stage{stage}."): where for key, where in cfg.origins.items()}
    return out


def method_of(cfg: Any) -> str:
    """The name of the method that a stage's configuration, or its section of stage=all, follows."""
    return cfg.method if any(f.name == "method" for f in fields(cfg)) else DEFAULT


def method_for(cfg: Any) -> Any:
    """The record of the method that a stage's configuration follows."""
    return declared(cfg.stage, method_of(cfg))
