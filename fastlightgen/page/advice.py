"""The command that comes next in a run folder. It is checked before it is shown, because it must run."""

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastlightgen.config import Run, after_stage, command, find_preset_weights, load, result_of
from fastlightgen.config.fields import default_of, show
from fastlightgen.config.stages import DEFAULT

STAGES = range(4)
OF_HERE = ("progress", "threads", "device")  # keys of one start on one machine, which are not repeated
OWN = ("stage", "run", "overwrite", "earlier", "dry_run", *OF_HERE)


def next_step(run: Path, config: dict, evaluated: bool, saved: Mapping[int, str]) -> tuple[str, str]:
    """What the run lacks first ("" if nothing), and the command that comes next ("" if none can be named).

    `config`: the content of RUN/config.yaml. `saved`: how far unfinished stages have come, in words. A run with an
    evaluated student lacks nothing.
    """
    begun = [n for n in STAGES if f"stage{n}" in config]
    if evaluated and 3 in begun:
        return "", after(run, config, 3, "all")
    if evaluated or not begun:
        return "", ""
    for stage in (*begun, *range(begun[-1] + 1, 4)):
        if result_of(run, stage).exists():
            continue
        if stage in begun:
            how_far = f": {saved[stage]}" if stage in saved else ""
            return f"Stage {stage} is not finished{how_far}", again(run, config, stage)
        return f"Stage {stage} comes next", after(run, config, stage - 1)
    if config["stage3"].get("data") != "shapes":  # nothing can score it
        return "", after(run, config, 3)
    teacher = str(config["stage3"].get("model", ""))
    known = Path(teacher).is_dir() or find_preset_weights(teacher)
    return "The student is not evaluated", after(run, config, 3) if known else ""


def after(run: Path, config: dict, stage: int, name: str = "") -> str:
    """The command that follows a complete stage; `name`: that of the command which ran it, if it ran others too."""
    record = {f.name: default_of(f) for f in fields(Run)} | config[f"stage{stage}"]
    record |= {f.name: default_of(f) for f in fields(Run) if f.name in OF_HERE}
    if stage < 3 and record["engine"] != "local":
        return ""  # a run of several processes: config.yaml does not know its launcher
    record |= {"stage": name or str(stage), "run": str(run)}
    return checked(after_stage(SimpleNamespace(**record, origins={"dtype": "config.yaml"})))


def again(run: Path, config: dict, stage: int) -> str:
    """The command that continues a stage with the settings that config.yaml holds for it."""
    record: dict[str, Any] = config[f"stage{stage}"]
    if record.get("engine", "local") != "local":
        return ""
    words = {"stage": stage, "run": run} | {k: record[k] for k in ("model", "data", "preset", "method") if k in record}
    try:
        defaults = vars(load([f"{k}={show(v)}" for k, v in words.items()]))
    except ValueError:
        return ""
    given = {k: v for k, v in record.items() if k not in OWN and k not in words and v != defaults.get(k, v)}
    usual = {"preset": "default", "method": DEFAULT}
    return checked(command("train", **{k: v for k, v in words.items() if usual.get(k) != v} | given))


def checked(line: str) -> str:
    """The command line, or "" if the command would refuse it, for example because a folder has moved."""
    _, _, module, *words = shlex.split(line)  # python -m fastlightgen.NAME
    words = [word.replace("=PIPELINE", "=.") for word in words]  # a folder that only the user knows
    try:
        load(words, module.removeprefix("fastlightgen."))
    except ValueError:
        return ""
    return line
