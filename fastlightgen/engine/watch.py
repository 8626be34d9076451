"""Drift alarms. An alarm prints a line, is added to alarms.jsonl, and may end the run.

The last good checkpoint is then kept, whatever `keep` says.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import StageFolder
from fastlightgen.engine.log import Lines, Metrics, read_metrics
from fastlightgen.engine.roles import Stage
from fastlightgen.metrics import drift
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say

REMEDY = "give alarms=warn to go on (from there, if you delete the later ones), or start another run= with a lower lr"


class Watch:
    """Judges every line of the log and the clips, on rank 0. With mode=stop an alarm ends the run on all ranks.

    All its state is read from the log's files at the start, so that a resumed run judges as one that went on.
    """

    def __init__(
        self,
        stage: Stage,
        folder: StageFolder,
        mode: str,
        metrics: Metrics | None,
        start: int,
        saves: checkpoint.Background,
    ):
        self.stage, self.mode, self.metrics, self.limits = stage, mode, metrics, drift.Limits()
        self.saves = saves
        self.checkpoints, self.lines, alarms = folder.checkpoints, [], []
        self.kept: int | None = None  # after an alarm: the step of the checkpoint before the first one; 0: none
        self.fine = 0  # the last step with clips that raised no alarm
        self.shown = 0  # the last step with clips
        if metrics:
            self.file = Lines(folder.path / "alarms.jsonl", start)
            alarms = read_metrics(self.file.path)
            self.lines = read_metrics(folder.path / "metrics.jsonl")
            shown = read_metrics(folder.path / "samples.jsonl")
            self.kept = alarms[0]["good"] if alarms else None
            self.fine = self.shown = shown[-1]["step"] if shown else 0
        self.sounding = {f.alarm for f in self._in_log()}
        # With mode=stop, running the same command again must not continue past an alarm.
        self._stop([(a["step"], a["alarm"], a["good"]) for a in alarms[:1]])

    def log(self, record: dict) -> None:
        """Judge a new line. An alarm is reported when it begins, not again while it lasts."""
        self.lines.append(record)
        found = self._in_log()
        new = [f for f in found if f.alarm not in self.sounding]
        self.sounding = {f.alarm for f in found}
        judged = self.lines[-self.limits.recent :][0]["step"]  # the first step that enters the recent median
        self._report(record["step"], new, self._newest(min(self.fine or judged, judged)))

    def clips(self, step: int, looks: Sequence[dict], real: Callable[[], Sequence[dict]]) -> None:
        """Log the look of new clips and judge it. `looks` and `real` are used on rank 0 only."""
        found = []
        if self.metrics:
            means = {f"clips_{name}": fmean(look[name] for look in looks) for name in drift.LOOK}
            self.metrics.write({"step": step} | {k: round(v, 3) for k, v in means.items()}, "samples")
            if self.mode != "off" and self.stage.drifts:
                found = drift.in_clips(looks, real(), self.limits)
        self._report(step, found, self._newest(self.fine or step - 1))
        if not found:
            self.fine = step

    def good(self) -> int:
        """Return the step of the checkpoint that must not be removed; 0 if there is none."""
        if self.mode == "off" or not self.stage.drifts:
            return self.kept or 0
        return self._newest(self.fine) if self.kept is None else self.kept

    def remind(self) -> None:
        """Repeat the first alarm at the end of the stage, where its own line may have scrolled away."""
        if not self.metrics or not (alarms := read_metrics(self.file.path)):
            return
        first = alarms[0]
        finding = drift.Finding(first["alarm"], first["value"], first["usual"])
        count = "1 alarm" if len(alarms) == 1 else f"{len(alarms)} alarms, the first"
        say(f"stage {self.stage.number}: {count} at step {first['step']}: {finding}; see {self.file.path}")

    def _in_log(self) -> list[drift.Finding]:
        """Return the alarms that the lines logged so far raise."""
        if not self.metrics or self.mode == "off":
            return []
        values = [r[self.stage.loss_key] for r in self.lines if self.stage.loss_key in r]
        found = [drift.in_loss(values, self.limits)]
        if self.stage.drifts:
            lines = [r for r in self.lines if "student_contrast_data" in r]  # only iterations that update the student
            made, data = ([r[key] for r in lines] for key in ("student_contrast", "student_contrast_data"))
            found.append(drift.in_contrast(made, data, self.limits))
        return [f for f in found if f]

    def _newest(self, last: int) -> int:
        """Return the newest checkpoint up to step `last`; 0 if there is none. One that is being written counts.

        An older one would be the wrong answer: the current save may be about to remove it (`keep`). If the current
        save fails, its own error ends the run.
        """
        started = [*checkpoint.steps(self.checkpoints), *self.saves.started()]
        return max((s for s in started if s <= last), default=0)

    def _report(self, step: int, found: list[drift.Finding], good: int) -> None:
        """Print and record alarms; remember the good checkpoint of the first one; with mode=stop end the run."""
        if found and self.kept is None:
            self.kept = good
        for finding in found:
            say(f"alarm: step {step}: {finding}")
            known = {"alarm": finding.alarm, "value": finding.value, "usual": finding.usual, "good": self.kept}
            self.file.write({"step": step} | known)
        self._stop([(step, "; ".join(map(str, found)), self.kept)] if found else [])

    def _stop(self, alarm: list[tuple[int, str, int | None]]) -> None:
        """With mode=stop, end the run on all ranks if rank 0 has an alarm: (step, alarms, checkpoint before it)."""
        if self.mode != "stop" or not (alarm := ranks.from_first(alarm)):
            return
        self.saves.wait()  # the error names this checkpoint, so that it must be complete
        step, found, kept = alarm[0]
        before = f"the last checkpoint before it is {checkpoint.path(self.checkpoints, kept)}" if kept else ""
        raise ValueError(f"alarms=stop: step {step}: {found}; {before or 'there is no checkpoint before it'}; {REMEDY}")
