"""Training and evaluating what a sweep lacks, several processes at a time, beside others on the same folder."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

import torch

from fastlightgen.atomic import take, write_json
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import COST
from fastlightgen.parallel.log import say
from fastlightgen.sweeps.points import Part, Point, unique
from fastlightgen.sweeps.processes import begin, run_command

POLL = 1.0  # seconds


def taken(path: Path) -> IO[str] | None:
    """Lock a piece of work until the file is closed; None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return take(path)


@dataclass
class Running:
    """A process that trains a part or evaluates a point."""

    name: str
    process: BaseProcess
    lock: IO[str]
    log: Path
    slot: int
    cost: Path
    began: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """Let others have the work, and add the seconds that it took to those of earlier tries."""
        seconds = time.monotonic() - self.began + (cost_of(self.cost) or 0.0)
        if self.cost.parent.is_dir():
            write_json(self.cost, {"seconds": seconds})
        self.lock.close()


def work(points: Sequence[Point], evaluate: bool, at_once: int) -> list[str]:
    """Train and evaluate what is left; return the names of what failed."""
    evaluated = {point.scores: point for point in points if evaluate and point.scorable}
    todo: dict[Path, Part | Point] = {part.folder: part for part in unique(lacking(points, evaluate))}
    todo |= evaluated
    running: list[Running] = []
    failed: list[str] = []
    # A scheduler, or a terminal that closes, ends it as Ctrl-C does.
    before = {one: signal.signal(one, signal.default_int_handler) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        while True:
            for one in [r for r in running if r.process.exitcode is not None]:
                running.remove(one)
                one.close()
                if one.process.exitcode or not finished(todo[Path(one.name)]):
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
                    running.append(start(str(key), todo[key], lock, slot))
            time.sleep(POLL)
    finally:
        for one in running:
            one.process.terminate()
            one.process.join()
            one.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def lacking(points: Sequence[Point], evaluate: bool) -> list[Point]:
    """The points whose parts are still needed: scores of a model are enough for the table, without the model."""
    return [point for point in points if not (evaluate and point.scorable and point.scores.exists())]


def finished(item: Part | Point) -> bool:
    return item.done if isinstance(item, Part) else item.scores.exists()


def is_ready(item: Part | Point) -> bool:
    return all(part.done for part in (item.after if isinstance(item, Part) else item.parts))


def cost_file(item: Part | Point) -> Path:
    return item.folder / "cost.json" if isinstance(item, Part) else item.scores.with_suffix(".cost.json")


def cost_of(file: Path) -> float | None:
    """The seconds that a piece of work took; None if no sweep has done it."""
    return read_json(file, COST, "delete it")["seconds"] if file.is_file() else None


def visible_gpus(names: str | None, count: int) -> list[str]:
    """The names of the GPUs that this process may use: a scheduler gives it some by number or by UUID, or all."""
    return names.split(",")[:count] if names else [str(i) for i in range(count)]


def start(name: str, item: Part | Point, lock: IO[str], slot: int) -> Running:
    """Begin a training or an evaluation in a process of its own, on a GPU of its own."""
    if isinstance(item, Part):
        words, command, log = [*item.words, "progress=false"], "train", item.folder / "log.txt"
    else:
        words = [f"model={item.model}", f"out={item.scores}", *item.plan, *item.where, "progress=false"]
        command, log = "evaluate", item.scores.with_suffix(".log")
    gpus = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())
    env = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    process = begin(run_command, (command, words), log, lock, **env)
    say(f"begun: {name} ({log})")
    return Running(name, process, lock, log, slot, cost_file(item))
