"""The training loop of all stages: updates, metrics, checkpoints, clips.

A signal ends it after the current step and a save. A resumed run computes bit for bit the same numbers.
"""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch

from fastlightgen.engine import checkpoint, damage
from fastlightgen.engine.choice import Choice
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.hang import HERE
from fastlightgen.engine.log import Metrics
from fastlightgen.engine.roles import Stage, Update, in_words
from fastlightgen.engine.watch import Watch
from fastlightgen.engine.writers import open_writers
from fastlightgen.models.base import VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.parallel.clock import clock
from fastlightgen.parallel.log import bar, meanwhile, say

REQUEUE = (signal.SIGTERM, signal.SIGUSR1)  # sent by a scheduler that will start the run again


class Stopped(KeyboardInterrupt):
    """A signal ended the run after its state was saved; `requeue` is True if a scheduler sent the signal."""

    def __init__(self, message: str, signal_name: str):
        super().__init__(message)
        self.requeue = signal_name in {s.name for s in REQUEUE}


class Engine(Protocol):
    """Runs the updates of a stage, in one process (local) or many (deepspeed)."""

    device: torch.device

    def place(self, net: VideoDiT) -> None:
        """Move a network that only predicts to its device, sharded if the engine shards."""

    def prepare(self, stage: Stage) -> None:
        """Place the networks of a stage and create their optimizers."""

    def estimate(self) -> str:
        """Describe the memory or the sharding of training, in one line."""

    def apply(self, update: Update, step: int) -> dict[str, float]:
        """Take one optimizer step and return the numbers to log."""

    def measures(self) -> dict[str, float]:
        """Return further numbers of a logged line, which are not measured in every step. All ranks call this."""

    def save(self, folder: Path, step: int, keep: int, every: int, good: int = 0) -> checkpoint.Saving:
        """Start writing a checkpoint; see `checkpoint.save`."""

    def load(self, folder: Path) -> int:
        """Load the newest checkpoint and return its step; 0 if there is none."""

    def autocast(self):
        """Return the context in which networks are called outside `apply`."""

    def finish(self) -> None:
        """Replace the weights by their average, in roles that keep one."""

    def save_model(self, net, folder: Path, dtype=None, **card) -> None:
        """Write a model folder."""


@contextmanager
def handling(signals: Sequence[signal.Signals], first: Callable[[str], None]) -> Iterator[None]:
    """Context in which the first signal calls `first` with its name, and a second one acts at once."""
    old = {s: signal.getsignal(s) for s in signals}

    def note(number: int, _frame: FrameType | None) -> None:
        # A second signal ends a run whose step hangs. Python's own handlers would wait for the end of a hanging call.
        for s, handler in old.items():
            signal.signal(s, signal.SIG_DFL if s in REQUEUE else handler)
        first(signal.Signals(number).name)

    for s in old:
        signal.signal(s, note)
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """Context with a list to which the first signal appends its name."""
    seen: list[str] = []
    with handling((signal.SIGINT, *REQUEUE), seen.append):
        yield seen


@contextmanager
def stoppable() -> Iterator[None]:
    """Context outside the steps, such as loading, in which a scheduler's signal raises Stopped; a second one kills.

    Only for one process: a handler in Python waits for the end of a collective, which may never come.
    """

    def stop(name: str) -> None:
        raise Stopped(f"{name}: stopped outside the steps; {ranks.GO_ON}", name)

    with handling(REQUEUE, stop):
        yield


class Show(Protocol):
    """Makes clips during training."""

    def write(self, folder: Path, step: int, how: dict, stopped: Callable[[], bool]) -> list[dict] | None:
        """Make clips with `how` (stage.sampler()) and return the look of each, on rank 0.

        `stopped` returns on all ranks whether any rank got a signal; then `write` returns None on all ranks.
        """

    def real(self) -> list[dict]:
        """Return the look of the real clips of the same prompts, and of some more."""


def train(
    stage: Stage,
    engine: Engine,
    folder: StageFolder,
    cfg,
    show: Show | None = None,
    look: Callable | None = None,
    choice: Choice | None = None,
) -> None:
    """Run or continue a stage to its end and write its model folder.

    `show` makes clips during training. `look` is called once, after the networks are placed. `choice` picks the
    weights that become the result; without it they are the last ones.
    """
    engine.prepare(stage)
    say(f"stage {stage.number}: {engine.estimate()}")
    if look:
        look()
    stage.begin()
    damage.check(folder.checkpoints, cfg.damaged)
    if start := engine.load(folder.checkpoints):
        say(f"stage {stage.number}: continues at step {start} of {stage.iters}")
    if choice:
        choice.start(start)

    metrics = Metrics(folder.path, start, open_writers(cfg, folder.path, start)) if ranks.rank() == 0 else None
    saves = checkpoint.Background()
    watch = Watch(stage, folder, cfg.alarms, metrics, start, saves)
    clock.restart()
    title = f"stage {stage.number}"
    with (
        closing(metrics) if metrics else nullcontext(),
        interruptible() as signals,
        saves,
        bar(stage.iters, title, cfg.progress and stage.iters > 0, start) as progress,
    ):

        def save(done: int) -> None:
            HERE.at("the checkpoint")
            saves.wait()  # one save at a time: each holds a full copy in host memory
            saves.saving = engine.save(folder.checkpoints, done, cfg.keep, cfg.keep_every, watch.good())

        def signalled() -> bool:
            return ranks.anyone(bool(signals))

        def clips(done: int) -> bool:
            """Make the clips of step `done`, if they are due; return False if a signal came before the last one."""
            if not show or not done or (done % cfg.sample_every and done < stage.iters):
                return True
            HERE.at("the clips")
            with meanwhile(progress, title, "making clips"):
                with engine.autocast():
                    looks = show.write(folder.path / "samples", done, stage.sampler(), signalled)
                if looks is not None:
                    if metrics:
                        metrics.clips(done, folder.path / "samples" / f"step-{done:06d}.gif")
                    watch.clips(done, looks, show.real)
            return looks is not None

        def stopped(done: int) -> Stopped:
            saves.wait()
            return saved_and_stopped(f"step {done} of {stage.iters}", signals, cfg.overwrite)

        # A signal may have ended the run between a checkpoint and the clips of the same step: make them now.
        if ranks.from_first(watch.shown) < start and not clips(start):
            raise stopped(start)
        for step in range(start, stage.iters):
            HERE.at("the step's data", step=step + 1)
            record: dict[str, float] = {}
            with clock.step():
                for update in stage.updates(step):
                    record |= engine.apply(update, step)
            done = step + 1
            if step % cfg.log_every == 0 or done == stage.iters:
                HERE.at("the numbers of a logged line", role="")
                line = {"step": done, **record, **engine.measures(), **clock.read()}
                if metrics:
                    metrics.write(line)
                watch.log(line)
                losses = {k: f"{v:.4g}" for k, v in record.items() if k.endswith("loss") and math.isfinite(v)}
                progress.set_postfix({in_words(k, stage.roles): v for k, v in losses.items()}, refresh=False)
            progress.update()
            HERE.at("the stage's check", role="")
            stage.check(done)
            if choice and choice.due(stage, done):
                HERE.at("the choice of the best weights")
                with meanwhile(progress, title, "comparing clips with real ones"):
                    measured = choice.look(stage, done)
                if metrics:
                    metrics.write(measured, "choices")
            # One collective per step for two facts. The lowest bit says that this rank got a signal, the other bits are
            # the status of its save. So all ranks stop after the same step; a later signal waits for the next one.
            flags = ranks.gathered(bool(signals) | saves.status())
            stop = any(flag & 1 for flag in flags)
            saves.update(flags)
            due = done % cfg.save_every == 0 or done == stage.iters
            if due or stop:
                save(done)
            if not stop and not clips(done):
                stop = True
                if not due:
                    save(done)
            if stop:
                raise stopped(done)
        saves.wait()
    engine.finish()
    if choice:
        choice.save(stage, folder.path / "model")
    else:
        stage.save(folder.path / "model", engine.save_model)
    if ranks.rank() == 0:  # the checkpoint that waited for an alarm is not needed any more
        checkpoint.thin(folder.checkpoints, cfg.keep, cfg.keep_every, watch.kept or 0)
    watch.remind()


def saved_and_stopped(what: str, signals: Sequence[str], overwrite: bool) -> Stopped:
    """Return the end of a run that a signal stopped after it had saved `what`. All ranks call this together."""
    name = gathered_names(signals)[0]
    command = "the same command" + " without overwrite=true" * overwrite
    return Stopped(f"{name}: saved {what}; run {command} to continue", name)


def gathered_names(signals: Sequence[str]) -> list[str]:
    """Return the name of the first signal of each rank that got one."""
    numbers = ranks.gathered(int(signal.Signals[signals[0]]) if signals else 0)
    return [signal.Signals(n).name for n in numbers if n]
