"""python -m fastlightgen.sweep run=DIR KEY=A,B KEY=C ... seeds=N: distil once per combination, compare the students.

Keys are those of `train stage=all`; a value with commas is a list, and every combination of the lists is one point. A
stage that several points share, with the same settings after the same earlier stages, is trained once. What is done is
skipped, so the same command continues. Several processes may work on one folder, such as the tasks of a Slurm array:
each takes what no other has begun.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastlightgen
from fastlightgen.atomic import locked, write_json, write_text
from fastlightgen.config import ConfigError, UserError, guarded, result_of
from fastlightgen.engine.local import pick_device
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import EVALUATION
from fastlightgen.files.tensors import read_tensors
from fastlightgen.metrics.seeds import over_seeds
from fastlightgen.page.summary import cost
from fastlightgen.parallel.log import say
from fastlightgen.stages.earlier import measured_speed, operations, span
from fastlightgen.sweeps.points import STAGES, Part, Point, points_of, unique
from fastlightgen.world.score import reference, resampled
from fastlightgen.world.source import open_source

HELP = """usage: fastlightgen sweep run=DIR KEY=A,B ... [seeds=N] [at_once=N] [clips=N] [dry_run=true]

  run        folder of the sweep (runs/sweep)
  seeds      training seeds: a number, or a list (1)
  at_once    stages that train at the same time (one per GPU; 1 on a CPU)
  clips      held-out clips per student (512); 0: do not evaluate
  dry_run    say what would be trained and how long it takes

All other keys are those of `fastlightgen train stage=all`: model=tiny steps=2,4 ratio=0.3,0.5 stage2.iters=100.
method= is a method of Stage II or III. A value with commas is a list; [1, 2] is one value."""
OWN = {"run": "runs/sweep", "seeds": "1", "at_once": "0", "clips": "512", "dry_run": "false"}
SHOWN = ("adherence", "frechet", "kid", "recall", "texture", "persistence")
AGAIN = "delete it, and the same command makes it again"
RATIO = 0.3  # share of the blocks that the estimate takes as dropped if no Stage I is part of the sweep
POLL = 1.0  # seconds


def values_of(text: str) -> list[str]:
    """ "2,4" -> ["2", "4"]; a comma inside brackets does not separate."""
    return [value.strip() for value in re.split(r",(?![^\[]*\])", text)]


def settings(words: Sequence[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Split the command line into the sweep's own keys and the lists of training keys."""
    own, swept = dict(OWN), {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{word!r}: wanted key=value, for example steps=2,4 (sweep --help lists the keys)")
        if key in OWN:
            own[key] = value
        else:
            swept[key] = values_of(value)
    for key in ("at_once", "clips"):
        if not own[key].isdigit():
            raise ConfigError(f"{key}={own[key]}: wanted a whole number from 0 up")
    return own, swept


def seeds_of(text: str) -> list[int]:
    numbers = values_of(text)
    if not all(number.isdigit() for number in numbers):
        raise ConfigError(f"seeds={text}: wanted a number of seeds, or a list as 0,1,2")
    return [int(n) for n in numbers] if len(numbers) > 1 else list(range(int(numbers[0])))


def plan(points: Sequence[Point], at_once: int) -> list[str]:
    """What is to do, and how long it takes at the speed of this machine."""
    parts = unique(points)
    left = [part for part in parts if not part.done]
    each = ", ".join(f"{sum(p.stage == n for p in left)} of stage {n}" for n in STAGES)
    lines = [f"{len(points)} students; {len(left)} of {len(parts)} trainings are left: {each}"]
    if left:
        cfg = left[0].cfg
        source = open_source(cfg.data, cfg.seed, cfg.negative)
        speed = measured_speed(cfg, source, pick_device(cfg.device))
        ratio = next((part.cfg.ratio for part in parts if part.stage == "1"), RATIO)
        seconds = sum(operations(part.cfg, source, ratio) for part in left) / speed
        lines.append(f"  {span(seconds)} of training in all, {at_once} at a time; estimated from the operations")
    return lines


def taken(path: Path) -> ExitStack | None:
    """Lock a piece of work until the stack is closed; None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stack = ExitStack()
    return stack if stack.enter_context(locked(path)) else None


@dataclass
class Running:
    """A process that trains a part or evaluates a point."""

    name: str
    process: subprocess.Popen
    lock: ExitStack
    log: Path
    slot: int


def work(points: Sequence[Point], clips: int, at_once: int) -> list[str]:
    """Train and evaluate what is left; return the names of what failed."""
    todo: dict[Path, Part | Point] = {part.folder: part for part in unique(points)}
    todo |= {point.scores: point for point in points if clips and point.parts[-1].cfg.data == "shapes"}
    running: list[Running] = []
    failed: list[str] = []
    try:
        while True:
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                one.lock.close()
                if one.process.returncode:
                    failed.append(one.name)
                    say(f"failed: {one.name}, see {one.log}")
                else:
                    say(f"done: {one.name}")
            left = [key for key, item in todo.items() if not finished(item) and str(key) not in failed]
            ready = [k for k in left if str(k) not in {r.name for r in running} and is_ready(todo[k])]
            if not running and not ready:
                if not left or failed:
                    return failed
                time.sleep(POLL)  # another process trains what is missing
                continue
            for key in ready:
                if len(running) >= at_once:
                    break
                if lock := taken(key.with_name(f".{key.name}.lock")):
                    slot = min(set(range(at_once)) - {r.slot for r in running})
                    running.append(start(str(key), todo[key], clips, lock, slot))
            time.sleep(POLL)
    finally:
        for one in running:
            one.process.terminate()
            one.process.wait()


def finished(item: Part | Point) -> bool:
    return item.done if isinstance(item, Part) else item.scores.exists()


def is_ready(item: Part | Point) -> bool:
    return all(part.done for part in (item.after if isinstance(item, Part) else item.parts))


def start(name: str, item: Part | Point, clips: int, lock: ExitStack, slot: int) -> Running:
    """Begin a training or an evaluation in a process of its own, on a GPU of its own."""
    if isinstance(item, Part):
        words, command, log = [*item.words, "progress=false"], "train", item.folder / "log.txt"
    else:
        last = item.parts[-1]
        words = [f"model={result_of(last.folder, 3)}", f"out={item.scores}", f"clips={clips}", "progress=false"]
        words += [f"device={last.cfg.device}", f"threads={last.cfg.threads}"]
        command, log = "evaluate", item.scores.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    if count := torch.cuda.device_count():
        env["CUDA_VISIBLE_DEVICES"] = str(slot % count)
    with open(log, "a") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", f"fastlightgen.{command}", *words], env=env, stdout=out, stderr=out
        )
    say(f"begun: {name}")
    return Running(name, process, lock, log, slot)


def rows_of(points: Sequence[Point]) -> Iterator[tuple[str, list[dict], list[Any]]]:
    """Per combination: its name, the records of its seeds, and their resampled scores."""
    for name, group in itertools.groupby(points, key=lambda point: point.name):
        own = [point for point in group if point.scores.exists()]
        records = [read_json(point.scores, EVALUATION, AGAIN) for point in own]
        files = [point.scores.with_suffix(".values.safetensors") for point in own]
        found = [resampled({k: v.double() for k, v in read_tensors(f).items()}, 0) for f in files]
        if own:
            yield name, records, found


def table(points: Sequence[Point], out: Path) -> str:
    """Compare every combination with the first one, over the seeds; write table.md and sweep.json."""
    rows = list(rows_of(points))
    if not rows:
        return ""
    lines = [
        "| | cost | seeds | " + " | ".join(SHOWN) + " | against the first row |",
        "|---|" + "---|" * (len(SHOWN) + 3),
    ]
    record = {}
    for name, records, found in rows:
        scores = {k: [f[k].value for f in found] for k in SHOWN if all(k in f for f in found)}
        cells = [f"{sum(scores[k]) / len(found):.4g}" if k in scores else "" for k in SHOWN]
        pairs = list(zip(found, rows[0][2], strict=False))
        differences = over_seeds(pairs, SHOWN, reference(0).look) if name != rows[0][0] else {}
        said = ", ".join(f"{k} {d['verdict']}" for k, d in differences.items() if k in ("adherence", "frechet"))
        clip = cost(records[0])
        lines.append(f"| {name} | {clip} | {len(found)} | {' | '.join(cells)} | {said} |")
        record[name] = {"cost": clip, "seeds": [r.get("seed") for r in records], "scores": scores}
        record[name] |= {"against_the_first": differences, "clips": records[0]["clips"]}
    lines.append("\nCost: block evaluations per clip. A difference counts if it exceeds two standard deviations.")
    write_json(out / "sweep.json", record)
    write_text(out / "table.md", "\n".join(lines) + "\n")
    return "\n".join(lines)


def sweep(words: Sequence[str]) -> None:
    """Run the command."""
    if {"-h", "--help"} & set(words):
        print(HELP)
        return
    if "--version" in words:
        print(f"fastlightgen {fastlightgen.__version__}")
        return
    own, swept = settings(words)
    run, seeds = Path(own["run"]), seeds_of(own["seeds"])
    points = points_of(run, {"model": ["tiny"], "data": ["shapes"]} | swept, seeds)
    at_once = int(own["at_once"]) or max(1, torch.cuda.device_count())
    say("\n".join(plan(points, at_once)))
    if own["dry_run"] == "true":
        return
    failed = work(points, int(own["clips"]), at_once)
    if text := table(points, run):
        say(f"{text}\n\n{run / 'table.md'}")
    if failed:
        raise UserError(f"{len(failed)} failed, first {failed[0]}; mend the cause, and the same command goes on")


if __name__ == "__main__":
    guarded(lambda: sweep(sys.argv[1:]))
