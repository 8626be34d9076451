"""python -m fastlightgen.sweep run=DIR KEY=A,B KEY=C ... seeds=N: distil once per combination, compare the students.

Keys are those of `train stage=all`; a value with commas is a list, and every combination of the lists is one point. A
stage that several points share, with the same settings after the same earlier stages, is trained once. What is done is
skipped, so the same command continues. Several processes may work on one folder, such as the tasks of a Slurm array:
each takes what no other has begun. table=5 and figure=1 train the rows of the paper's table or figure instead.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import fastlightgen
from fastlightgen.config import SHAPES_PROMPT, ConfigError, UserError, command, guarded
from fastlightgen.config.fields import clipped
from fastlightgen.config.files import presets
from fastlightgen.config.limits import MOST_CLIPS, MOST_POINTS, MOST_THREADS
from fastlightgen.config.run import MAX_SEED
from fastlightgen.metrics.intervals import MIN_CLIPS
from fastlightgen.parallel.log import say
from fastlightgen.sweeps import papers
from fastlightgen.sweeps.estimate import plan
from fastlightgen.sweeps.points import SHAPES, Part, Point, points_of
from fastlightgen.sweeps.table import table
from fastlightgen.sweeps.work import work

HELP = """usage: fastlightgen sweep run=DIR KEY=A,B ... [seeds=N] [at_once=N] [clips=N] [dry_run=true]
       fastlightgen sweep table=N,... figure=N,... [run=DIR] [seeds=N] ...

  run        folder of the sweep (runs/sweep; runs/papers for tables and figures)
  table      tables of the paper, as the built-in world has them: 2, 4 to 9, lightning-2 and -3, vdmini-2 and -3, or all
  figure     figures of the paper: 1, 2, or all
  seeds      training seeds: a number, or a list (1)
  at_once    stages that train at the same time (one per GPU; 1 on a CPU)
  clips      held-out clips per student (512); 0: do not evaluate
  dry_run    say what would be trained and how long it takes

All other keys are those of `fastlightgen train stage=all`: model=tiny steps=2,4 ratio=0.3,0.5 stage2.iters=100.
method= is a method of Stage II or III, config= a recipe. A value with commas is a list; [1, 2] is one value.

Writes run/table.md, table.svg and sweep.json, or a file for each table and figure; the models are in run/parts, their
scores in run/scores. The table compares every row with the first one. A stage trains on one GPU."""
OWN = {"run": "", "seeds": "1", "at_once": "0", "clips": "512", "dry_run": "false", "table": "", "figure": ""}


def values_of(text: str) -> list[str]:
    """ "2,4" -> ["2", "4"]; a comma inside brackets does not separate."""
    return [value.strip() for value in re.split(r",(?![^\[]*\])", text)]


def settings(words: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split the command line into the sweep's own keys and the lists of training keys."""
    own, swept, given = dict(OWN), {}, set[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ConfigError(
                f"{clipped(word)!r}: wanted key=value, for example steps=2,4 (sweep --help lists the keys)"
            )
        if key in given:
            raise ConfigError(f"{clipped(key)} is given twice: keep one")
        given.add(key)
        if key in OWN:
            own[key] = value
        else:
            swept[key] = values_of(value)
    for key, most in (("at_once", MOST_THREADS), ("clips", MOST_CLIPS)):
        whole_number(key, own[key], 0, most)
    if own["dry_run"] not in ("true", "false"):
        raise ConfigError(f"dry_run={clipped(own['dry_run'])}: wanted true or false")
    return own, swept


def whole_number(key: str, text: str, least: int, most: int, wanted: str = "a whole number") -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise ConfigError(f"{key}={clipped(text)}: wanted {wanted} from {least} to {most}")
    return int(text)


def seeds_of(text: str) -> list[int]:
    """ "2" -> [0, 1]; "3,7" -> [3, 7]."""
    numbers = values_of(text)
    if len(numbers) > 1:
        return [whole_number("seeds", number, 0, MAX_SEED, "seeds") for number in numbers]
    return list(range(whole_number("seeds", text, 1, MOST_POINTS, "a list as 0,1,2, or a number of seeds")))


def sweep(words: Sequence[str]) -> None:
    """Run the command."""
    if {"-h", "--help"} & set(words):
        print(HELP)
        return
    if "--version" in words:
        print(f"fastlightgen {fastlightgen.__version__}")
        return
    if not words:
        raise ConfigError("wanted what to compare, for example steps=2,4, or table=5 (sweep --help lists the keys)")
    own, swept = settings(words)
    run, groups = folder_of(own), groups_of(own, swept)
    points = [point for group in groups.values() for point in group]
    evaluate, at_once = own["clips"] != "0", int(own["at_once"]) or max(1, torch.cuda.device_count())
    if 0 < int(own["clips"]) < MIN_CLIPS:
        say(
            f"warning: clips={own['clips']}: {MIN_CLIPS} clips or more rank models; with fewer the table has no verdict"
        )
    say("\n".join(plan(points, evaluate, at_once)))
    if own["dry_run"] == "true":
        return say("next: the same command without dry_run=true")
    failed = work(points, evaluate, at_once)
    for name, group in groups.items():
        text = papers.report(papers.read(name), group, run) if name else table(group, run)
        if text:
            say(f"{text}\n\n{run / (name or 'table')}.md\n")
    if failed:
        raise UserError(f"{len(failed)} failed, first {failed[0]}; mend the cause, and the same command goes on")
    last = points[-1]
    if last.data == SHAPES:
        say(f"next: {command('generate', model=last.model, prompt=SHAPES_PROMPT, out=run / 'clip.gif')}")
    else:
        say(f"next: {command('export', model=last.model, pipeline='PIPELINE', out=run / 'student')}")


def folder_of(own: dict[str, str]) -> Path:
    return Path(own["run"] or ("runs/papers" if own["table"] or own["figure"] else "runs/sweep"))


def groups_of(own: dict[str, str], swept: dict[str, list[str]]) -> dict[str, list[Point]]:
    """The points of each table and figure, which share what is equal; under "" those of the lists."""
    run, seeds, clips = folder_of(own), seeds_of(own["seeds"]), int(own["clips"])
    asked = [*names("table", own["table"]), *names("figure", own["figure"])]
    if not asked:
        return {"": points_of(run, swept, seeds, clips)}
    for key, values in swept.items():
        if len(values) > 1:
            raise ConfigError(
                f"{clipped(key)}={clipped(','.join(values))}: a table of the paper takes one value of a key"
            )
    known: dict[Path, Part] = {}
    more = {key: values[0] for key, values in swept.items()}
    return {name: papers.points_of(run, papers.read(name), more, seeds, clips, known) for name in asked}


def names(kind: str, asked: str) -> list[str]:
    """The files of configs/papers for `table=2,5` or `figure=all`."""
    known = [name for name in presets("papers") if name.startswith(f"{kind}-")]
    return known if asked == "all" else [f"{kind}-{value}" for value in values_of(asked) if value]


if __name__ == "__main__":
    guarded(lambda: sweep(sys.argv[1:]))
