"""The command that makes what a run folder lacks next. It is checked before it is shown, because it must run."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastlightgen.config import Run, find_preset_weights, load
from fastlightgen.config.fields import show
from fastlightgen.config.stages import DEFAULT

RESULTS = {0: "model", 1: "importance.json", 2: "model", 3: "model"}  # of each stage, in RUN/stageN
OWN = ("stage", "run", "overwrite", "earlier", "dry_run", "progress", "threads", "device")  # keys that are not repeated


def made(run: Path, stage: int) -> bool:
    return (run / f"stage{stage}" / RESULTS[stage]).exists()


def next_step(run: Path, config: dict, evaluated: bool) -> tuple[str, str]:
    """What is missing first, and the command that makes it; the command is "" if none can be named.

    `config`: the content of RUN/config.yaml. A run with an evaluated student lacks nothing.
    """
    if evaluated:
        return "", ""
    stages = [n for n in RESULTS if f"stage{n}" in config]
    if not stages:
        return "", ""
    if 0 in stages and not made(run, 0):
        return "Stage 0 is not finished", again(run, config, 0)
    for stage in (1, 2, 3):
        if not made(run, stage):
            found = "is not finished" if stage in stages else "comes next"
            return f"Stage {stage} {found}", again(run, config, stage)
    record = config.get("stage3", {})
    if record.get("data") != "shapes":  # nothing can score it
        return "", ""
    teacher = str(record.get("model", ""))
    if not (Path(teacher).is_dir() or find_preset_weights(teacher)):
        return "The student is not evaluated", ""
    words = [f"model={run / 'stage3' / 'model'}", f"teacher={teacher}", f"out={run / 'evaluate' / 'student.json'}"]
    return "The student is not evaluated", checked("evaluate", words)


def again(run: Path, config: dict, stage: int) -> str:
    """The command that starts or continues a stage with the settings that config.yaml holds for it.

    A stage that was never started takes over what the stage before it shares with it. A run of several processes has no
    such command: config.yaml does not know its launcher.
    """
    record: dict[str, Any] = config.get(f"stage{stage}") or {}
    if not record:
        last = max(n for n in RESULTS if f"stage{n}" in config)
        shared = {f.name for f in fields(Run)}
        record = {k: v for k, v in config[f"stage{last}"].items() if k in shared}
        if last == 0:
            record["model"] = str(run / "stage0" / "model")  # the teacher that this run trained
    if record.get("engine", "local") != "local":
        return ""
    words = {"stage": stage, "run": run} | {k: record[k] for k in ("model", "data", "preset", "method") if k in record}
    try:
        defaults = vars(load([f"{k}={show(v)}" for k, v in words.items()]))
    except ValueError:
        return ""
    given = {k: v for k, v in record.items() if k not in OWN and k not in words and v != defaults.get(k, v)}
    usual = {"preset": "default", "method": DEFAULT}
    words = {k: v for k, v in words.items() if usual.get(k) != v} | given
    return checked("train", [f"{k}={show(v)}" for k, v in words.items()])


def checked(command: str, words: list[str]) -> str:
    """The command line, or "" if the command would refuse these words, for example because a folder has moved."""
    try:
        load(words, command)
    except ValueError:
        return ""
    return shlex.join(["python", "-m", f"fastlightgen.{command}", *words])
