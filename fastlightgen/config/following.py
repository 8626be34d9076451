"""What a command says of itself: where its settings come from, and which command follows, ready to be pasted."""

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from fastlightgen.config.cli import load
from fastlightgen.config.fields import ConfigError, default_of, show
from fastlightgen.config.files import find_preset_weights, presets
from fastlightgen.config.layers import CONFIG, default_run, leaves
from fastlightgen.config.plan import IN_TURN, Plan
from fastlightgen.config.run import Run
from fastlightgen.config.stages import DEFAULT, STAGES, declared, method_of

SHAPES_PROMPT, PROMPT = "a red ball moves right fast then turns up", "A cat runs over wet sand."
OF_ONE_START = {"stage", "overwrite", "earlier", "dry_run"}  # keys that the next command leaves out
HOST = "HOST"  # stands for the name of the first host
OF_ALL = ("device", "threads", "allow_pt")  # keys that train, evaluate and generate have


def settings(cfg: Any) -> list[str]:
    """The model, the data, the time shift and the run folder of a training run, and what set each."""
    keys = ["model", "data", *(key for key in leaves(type(cfg)) if key.rpartition(".")[2] == "shift"), "run"]
    rows = [(key, show(attrgetter(key)(cfg)), cfg.origins.get(key, "default")) for key in keys]
    first, second = (max(len(row[n]) for row in rows) for n in (0, 1))
    lines = [f"  {key:<{first}}  {value:<{second}}  ({origin})" for key, value, origin in rows]
    name = vars(cfg).get("method", DEFAULT)
    about = STAGES[cfg.stage] if name == DEFAULT else f"method={name}, {declared(cfg.stage, name).about}"
    return [f"stage={cfg.stage}: {about}", *lines]


def command(name: str, **keys: Any) -> str:
    """`python -m fastlightgen.NAME key=value ...`, quoted for bash and zsh; train: with as many processes as now."""
    torchrun = name == "train" and "TORCHELASTIC_RUN_ID" in os.environ
    start = ["python"]
    if torchrun:
        per_host, processes = (int(os.environ[k]) for k in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        start = launcher(per_host, processes, os.environ.get("MASTER_ADDR", HOST))
    return shlex.join([*start, "-m", f"fastlightgen.{name}", *words(keys)])


def launcher(per_host: int, processes: int, first: str = HOST) -> list[str]:
    """The words that start this host's share of `processes`; `first`: the host at which all hosts meet."""
    each = f"--nproc-per-node={min(per_host, processes)}"
    if processes <= per_host:
        return ["torchrun", each]
    hosts = -(-processes // per_host)
    return ["torchrun", f"--nnodes={hosts}", each, "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29500"]


def words(keys: Mapping[str, Any]) -> list[str]:
    return [f"{key}={show(value)}" for key, value in keys.items()]


def keys_for(cfg: Any, stage: str, **others: Any) -> dict[str, Any]:
    """The keys that start another stage of the run of `cfg` on the same machine; `others` replace some of them."""
    left = OF_ONE_START | unset_type(cfg)
    given = [f for f in fields(Run) if f.name not in left and getattr(cfg, f.name) != default_of(f)]
    common = {f.name: getattr(cfg, f.name) for f in given}
    if file := cfg.origins.get(CONFIG):  # a file for all stages stays; of one for this stage the common keys remain
        short = {CONFIG: file, **{key: value for key, value in common.items() if cfg.origins.get(key) != file}}
        try:
            load(words({"stage": stage, **short, **others}))
        except ConfigError:
            pass
        else:
            common = short
    return {"stage": stage, **common, **others}


def unset_type(cfg: Any) -> set[str]:
    """{"dtype"} if nothing set it, so that `cfg` holds what auto stands for; auto will stand for the same."""
    return set() if "dtype" in cfg.origins else {"dtype"}


def with_type(cfg: Any, dtype: str) -> Any:
    """The configuration with the type that dtype=auto stands for; it counts as a type that nobody chose."""
    out = replace(cfg, dtype=dtype)
    out.origins = {k: where for k, where in cfg.origins.items() if k != "dtype" or cfg.dtype != "auto"}
    return out


def folder_name(stage: int | str) -> str:
    """The folder of a stage in its run, and its section of the run's config.yaml: stage0 to stage3, or decoder."""
    return stage if stage == "decoder" else f"stage{stage}"


def result_of(run: str | Path, stage: int | str) -> Path:
    """The file or folder that a stage leaves when it is complete."""
    return Path(run) / folder_name(stage) / ("importance.json" if stage == 1 else "model")


def own_pipeline(folder: str) -> str:
    """The folder if it is a pipeline; else PIPELINE, which the user has to replace."""
    return folder if (Path(folder) / "model_index.json").is_file() else "PIPELINE"


def after_stage(cfg: Any) -> str:
    """The command that follows a stage."""
    run = Path(cfg.run)
    if cfg.stage == "decoder":
        return command(
            "export",
            model="STUDENT",
            pipeline=own_pipeline(cfg.vae),
            vae=result_of(run, "decoder"),
            out=run / "student",
        )
    if cfg.stage == "0":
        return command("train", **keys_for(cfg, "1", model=result_of(run, 0)))
    if cfg.stage in ("1", "2"):
        # Other methods of Stage II leave no strong teacher beside the pruned network.
        own = {"strong": "original"} if cfg.stage == "2" and vars(cfg).get("method", DEFAULT) != DEFAULT else {}
        if vars(cfg).get("f3", "block") != "block":  # Stage III would train the silenced heads again
            if cfg.data != "shapes":
                own_folder = cfg.pipeline or own_pipeline(cfg.model)
                return command("export", model=result_of(run, 2), pipeline=own_folder, out=run / "f3")
            return command("evaluate", model=result_of(run, 2), teacher=cfg.model, out=run / "evaluate" / "f3.json")
        return command("train", **keys_for(cfg, str(int(cfg.stage) + 1), **own))
    student = result_of(run, 3)
    if cfg.data != "shapes":
        pipeline = cfg.pipeline or own_pipeline(cfg.model)
        return command("export", model=student, pipeline=pipeline, out=run / "student")
    rest = {f.name: value for f in fields(Run) if f.name in OF_ALL and (value := getattr(cfg, f.name)) != f.default}
    if cfg.stage == "all":  # it was evaluated already
        return command("generate", model=student, prompt=SHAPES_PROMPT, out=run / "clip.gif", **rest)
    out = run / "evaluate" / "student.json"
    return command("evaluate", model=student, teacher=cfg.model, out=out, **rest)


def after_plan(cfg: Plan) -> str:
    """The training command that a plan is about. MODEL, CACHE and HOST stand for what the plan does not know."""
    start = {"stage": cfg.stage, "run": cfg.run or default_run(cfg.model), "model": cfg.model}
    if file := cfg.origins.get(CONFIG):  # a recipe; a file with keys of `plan` alone is written out instead
        with suppress(ConfigError):
            load(words({CONFIG: file, **start}))
            start = {CONFIG: file, **start}
    parts = {f"stage{n}.": getattr(cfg, f"stage{n}") for n in IN_TURN} if cfg.stage == "all" else {"": cfg}
    methods = {f"{prefix}method": method_of(part) for prefix, part in parts.items()}
    start |= {key: name for key, name in methods.items() if name != DEFAULT}
    start |= {"preset": cfg.preset} if cfg.preset != default_of(leaves(Run)["preset"]) else {}
    trained = load(words(start))
    left = {"run", *OF_ONE_START} | unset_type(cfg)
    values = {key: attrgetter(key) for key in leaves(type(trained)) if key not in left and key in leaves(type(cfg))}
    keys = start | {key: value(cfg) for key, value in values.items() if value(cfg) != value(trained)}
    if find_preset_weights(cfg.model) is None:
        keys |= {"model": "MODEL"} if cfg.model in presets() else {}
        keys |= {"data": "CACHE"} if cfg.data == "shapes" else {}
    program = launcher(cfg.gpus_per_node, cfg.gpus) if cfg.gpus > 1 else ["python"]
    return shlex.join([*program, "-m", "fastlightgen.train", *words(keys)])
