"""The only training loop: updates, metrics, checkpoints; stops cleanly when it is told to, resumes bit for bit."""

import math
import signal
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch

from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.hang import HERE
from fastlightgen.engine.log import Metrics
from fastlightgen.engine.roles import Stage, Update
from fastlightgen.engine.watch import Watch
from fastlightgen.engine.writers import open_writers
from fastlightgen.models.base import VideoDiT
from fastlightgen.parallel import ranks
from fastlightgen.parallel.clock import clock
from fastlightgen.parallel.log import bar, say

REQUEUE = (signal.SIGTERM, signal.SIGUSR1)  # a scheduler's: end soon, to be started again


class Stopped(KeyboardInterrupt):
    """The run was interrupted after its state was saved; `signal` is what interrupted it."""

    def __init__(self, message: str, signal_name: str):
        super().__init__(message)
        self.requeue = signal_name in {s.name for s in REQUEUE}


class Engine(Protocol):
    """What runs the updates of a stage: one process (local) or many (deepspeed)."""

    device: torch.device

    def place(self, net: VideoDiT) -> None:
        """Put a network that only predicts where the engine wants it."""

    def prepare(self, stage: Stage) -> None:
        """Place the networks of a stage and make their optimizers."""

    def estimate(self) -> str: ...

    def apply(self, update: Update, step: int) -> dict[str, float]: ...

    def save(self, folder: Path, step: int, keep: int, every: int, good: int = 0) -> checkpoint.Saving: ...

    def load(self, folder: Path) -> int: ...

    def autocast(self): ...

    def finish(self) -> None: ...

    def save_model(self, net, folder: Path, dtype=None, **card) -> None: ...


@contextmanager
def interruptible():
    """A list that gets the signal's name: the loop then saves and stops. A second signal acts at once."""
    seen: list[str] = []
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, *REQUEUE)}

    def note(number: int, _frame) -> None:
        seen.append(signal.Signals(number).name)
        for s, handler in old.items():
            signal.signal(s, handler)

    for s in old:
        signal.signal(s, note)
    try:
        yield seen
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


class Show(Protocol):
    """Makes clips on the way."""

    def write(self, folder: Path, step: int, how: dict, stopped: Callable[[], bool]) -> list[dict] | None:
        """`how`: stage.sampler(); `stopped`: is a signal waiting? Returns the look of every clip, on rank 0; None on
        all ranks if there was a signal."""

    def real(self) -> list[dict]:
        """The look of the real clips of the same prompts, and of some more."""


def train(
    stage: Stage, engine: Engine, folder: StageFolder, cfg, show: Show | None = None, look: Callable | None = None
) -> None:
    """Run or continue a stage to its end and write its model folder; `show` makes clips on the way, `look` is called
    once the networks are placed."""
    engine.prepare(stage)
    say(f"stage {stage.number}: {engine.estimate()}")
    if look:
        look()
    stage.begin()
    if start := engine.load(folder.checkpoints):
        say(f"stage {stage.number}: continues at step {start} of {stage.iters}")

    metrics = Metrics(folder.path, start, open_writers(cfg, folder.path, start)) if ranks.rank() == 0 else None
    saves = checkpoint.Background()
    watch = Watch(stage, folder, cfg.alarms, metrics, start, saves)
    clock.restart()
    title = f"stage {stage.number}"
    with (
        closing(metrics) if metrics else nullcontext(),
        interruptible() as signals,
        saves,
        bar(stage.iters, title, cfg.progress, start) as progress,
    ):

        def save(done: int) -> None:
            HERE.at("the checkpoint")
            saves.wait()
            saves.saving = engine.save(folder.checkpoints, done, cfg.keep, cfg.keep_every, watch.good())

        def clips(done: int) -> bool:
            """Make them if it is their turn; False: a signal came before they were there."""
            if not show or not done or (done % cfg.sample_every and done < stage.iters):
                return True
            HERE.at("the clips")
            with engine.autocast():
                looks = show.write(folder.path / "samples", done, stage.sampler(), lambda: ranks.anyone(bool(signals)))
            if looks is not None:
                watch.clips(done, looks, show.real)
            return looks is not None

        def stopped(done: int) -> Stopped:
            saves.wait()
            name = gathered_names(signals)[0]
            return Stopped(f"{name}: saved step {done} of {stage.iters}; run the same command to continue", name)

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
                line = {"step": done, **record, **clock.read()}
                if metrics:
                    metrics.write(line)
                watch.log(line)
                shown = {k: f"{v:.4g}" for k, v in record.items() if k.endswith("loss") and math.isfinite(v)}
                progress.set_postfix(shown, refresh=False)
            progress.update()
            HERE.at("the stage's check", role="")
            stage.check(done)
            # One collective: is there a signal (one that comes later waits for the next step), is a save under way?
            told = ranks.gathered(bool(signals) | saves.state())
            stop = any(number & 1 for number in told)
            saves.hear(told)
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
    stage.save(folder.path / "model", engine.save_model)


def gathered_names(signals: list[str]) -> list[str]:
    """The first signal of every rank that got one."""
    numbers = ranks.gathered(int(signal.Signals[signals[0]]) if signals else 0)
    return [signal.Signals(n).name for n in numbers if n]
