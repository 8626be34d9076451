"""The only training loop: updates, metrics, checkpoints; stops cleanly on Ctrl-C and SIGTERM, resumes bit for bit."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.log import Metrics, bar, say
from fastlightgen.engine.roles import Stage


class Stopped(KeyboardInterrupt):
    """The run was interrupted after its state was saved."""


@contextmanager
def interruptible():
    """A list that gets the signal's name: the loop then saves and stops. A second signal acts at once."""
    seen: list[str] = []
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

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


Show = Callable[[Path, int, dict, Callable[[], bool]], None]  # folder, step, stage.sampler(), is a signal waiting?


def train(stage: Stage, engine: LocalEngine, folder: StageFolder, cfg, show: Show | None = None) -> None:
    """Run or continue a stage to its end and write its model folder; `show` makes clips on the way."""
    engine.prepare(stage)
    stage.begin()
    say(f"stage {stage.number}: {engine.estimate()}")
    start = 0
    if (found := checkpoint.load_latest(folder.checkpoints)) is not None:
        files, meta = found
        engine.load_state(files, meta["count"])
        start = meta["step"]
        say(f"stage {stage.number}: continues at step {start} of {stage.iters}")

    def save(step: int) -> None:
        files, count = engine.state()
        checkpoint.save(folder.checkpoints, step, files, {"count": count}, cfg.keep)

    metrics = Metrics(folder.path / "metrics.jsonl", start)
    with interruptible() as signals, bar(stage.iters, f"stage {stage.number}", cfg.progress, start) as progress:
        for step in range(start, stage.iters):
            clock = time.perf_counter()
            record: dict[str, float] = {}
            for update in stage.updates(step):
                record |= engine.apply(update, step)
            done = step + 1
            if step % cfg.log_every == 0 or done == stage.iters:
                metrics.write({"step": done, **record, "sec_per_step": round(time.perf_counter() - clock, 4)})
                shown = {k: f"{v:.4g}" for k, v in record.items() if k.endswith("loss") and math.isfinite(v)}
                progress.set_postfix(shown, refresh=False)
            progress.update()
            stage.check(done)
            stop = bool(signals)  # read once: a signal from here on waits for the next step
            if done % cfg.save_every == 0 or done == stage.iters or stop:
                save(done)
            if show and not stop and (done % cfg.sample_every == 0 or done == stage.iters):
                with engine.autocast():
                    show(folder.path / "samples", done, stage.sampler(), lambda: bool(signals))
            if stop and done < stage.iters:
                raise Stopped(f"{signals[0]}: saved step {done} of {stage.iters}; run the same command to continue")
    metrics.close()
    engine.finish()
    stage.save(folder.path / "model")
