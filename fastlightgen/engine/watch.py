"""Drift alarms: a line on the screen and in alarms.jsonl, or the end of the run; the last good checkpoint stays."""

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
    """Looks at every line of the log and at the clips. Rank 0 looks; `mode` stop ends the run on all ranks.

    What it knows comes from the log's files, so that a run which is continued knows the same.
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
        self.kept: int | None = None  # the checkpoint before the first alarm; 0: there is none
        self.fine = 0  # the last step whose clips were as usual
        self.shown = 0  # the last step with clips
        if metrics:
            self.file = Lines(folder.path / "alarms.jsonl", start)
            alarms = read_metrics(self.file.path)
            self.lines = read_metrics(folder.path / "metrics.jsonl")
            shown = read_metrics(folder.path / "samples.jsonl")
            self.kept = alarms[0]["good"] if alarms else None
            self.fine = self.shown = shown[-1]["step"] if shown else 0
        self.sounding = {f.alarm for f in self._in_log()}
        self._stop([(a["step"], a["alarm"], a["good"]) for a in alarms[:1]])

    def log(self, record: dict) -> None:
        """Judge a new line."""
        self.lines.append(record)
        found = self._in_log()
        new = [f for f in found if f.alarm not in self.sounding]
        self.sounding = {f.alarm for f in found}
        judged = self.lines[-self.limits.recent :][0]["step"]  # what the medians are of began here
        self._tell(record["step"], new, self._newest(min(self.fine or judged, judged)))

    def clips(self, step: int, looks: Sequence[dict], real: Callable[[], Sequence[dict]]) -> None:
        """Note the look of new clips, which rank 0 has, and judge it."""
        found = []
        if self.metrics:
            means = {f"clips_{name}": fmean(look[name] for look in looks) for name in drift.LOOK}
            self.metrics.write({"step": step} | {k: round(v, 3) for k, v in means.items()}, "samples")
            if self.mode != "off" and self.stage.drifts:
                found = drift.in_clips(looks, real(), self.limits)
        self._tell(step, found, self._newest(self.fine or step - 1))
        if not found:
            self.fine = step

    def good(self) -> int:
        """The step of a checkpoint that must not be removed; 0: none."""
        if self.mode == "off" or not self.stage.drifts:
            return self.kept or 0
        return self._newest(self.fine) if self.kept is None else self.kept

    def _in_log(self) -> list[drift.Finding]:
        if not self.metrics or self.mode == "off":
            return []
        values = [r[self.stage.loss_key] for r in self.lines if self.stage.loss_key in r]
        found = [drift.in_loss(values, self.limits)]
        if self.stage.drifts:
            lines = [r for r in self.lines if "student_contrast_data" in r]  # not every line has the student
            made, data = ([r[key] for r in lines] for key in ("student_contrast", "student_contrast_data"))
            found.append(drift.in_contrast(made, data, self.limits))
        return [f for f in found if f]

    def _newest(self, last: int) -> int:
        """The newest checkpoint up to step `last`; 0: none. One that is still being written counts.

        An older one must not be named in its place: the save under way may be about to remove it (`keep`). If that
        save fails, its error ends the run.
        """
        started = [*checkpoint.steps(self.checkpoints), *self.saves.started()]
        return max((s for s in started if s <= last), default=0)

    def _tell(self, step: int, found: list[drift.Finding], good: int) -> None:
        if found and self.kept is None:
            self.kept = good
        for finding in found:
            say(f"alarm: step {step}: {finding}")
            known = {"alarm": finding.alarm, "value": finding.value, "usual": finding.usual, "good": self.kept}
            self.file.write({"step": step} | known)
        self._stop([(step, "; ".join(map(str, found)), self.kept)] if found else [])

    def _stop(self, alarm: list[tuple[int, str, int | None]]) -> None:
        """End the run on all ranks, with what rank 0 found: step, alarms, the checkpoint before."""
        if self.mode != "stop" or not (alarm := ranks.from_first(alarm)):
            return
        self.saves.wait()  # the checkpoint that the error names is complete when the run ends
        step, told, kept = alarm[0]
        before = f"the last checkpoint before it is {checkpoint.path(self.checkpoints, kept)}" if kept else ""
        raise ValueError(f"alarms=stop: step {step}: {told}; {before or 'there is no checkpoint before it'}; {REMEDY}")
