"""The table of a sweep: the scores of its models, and their differences over seeds and clips."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json, write_text
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import EVALUATION
from fastlightgen.files.tensors import read_tensors
from fastlightgen.metrics.intervals import MIN_CLIPS, Resampled
from fastlightgen.metrics.seeds import over_seeds, spread
from fastlightgen.page.summary import cost
from fastlightgen.sweeps.points import Point
from fastlightgen.world.score import reference, resampled

SHOWN = ("adherence", "frechet", "kid", "recall", "texture", "persistence")
COUNTS = "+-: two standard deviations over training seeds and sets of clips. A difference counts if it exceeds its own."
LEADING = ("adherence", "frechet")  # shown with their spread
AGAIN = "delete it, and the same command makes it again"


@dataclass
class Row:
    """A model that is measured: the record and the resampled scores of every seed; few clips have no resamples."""

    name: str
    records: list[dict[str, Any]]
    found: list[dict[str, Resampled]]

    @property
    def record(self) -> dict[str, Any]:
        """The record of the first seed."""
        return self.records[0]

    @property
    def cost(self) -> int:
        """Block evaluations per clip."""
        return cost(self.record)

    def scores(self) -> dict[str, list[float]]:
        """The value of each score with each seed."""
        scores = [{k: v for k, v in r["scores"].items() if v is not None and math.isfinite(v)} for r in self.records]
        return {k: [own[k] for own in scores] for k in SHOWN if all(k in own for own in scores)}

    def means(self) -> dict[str, float]:
        """The mean of each score over the seeds."""
        return {k: sum(values) / len(values) for k, values in self.scores().items()}

    def spreads(self) -> dict[str, float]:
        """Two standard deviations of each mean, over seeds and sets of clips."""
        return {k: spread(self.found, k) for k in self.means() if all(k in own for own in self.found)}

    def cells(self) -> list[str]:
        means, spreads = self.means(), self.spreads()
        beside = {k: f" +- {spreads[k]:.2g}" for k in LEADING if k in spreads}
        return [f"{means[k]:.4g}{beside.get(k, '')}" if k in means else "" for k in SHOWN]


def rows_of(points: Sequence[Point]) -> dict[str, Row]:
    """The models that are measured, by name, in the order of the points. Points of one name differ in their seed."""
    rows = {}
    for name, group in itertools.groupby(points, key=lambda point: point.name):
        own = [point for point in group if point.scores.exists()]
        if own:
            records = [read_json(point.scores, EVALUATION, AGAIN) for point in own]
            files = [point.scores.with_suffix(".values.safetensors") for point in own]
            found = [resampled({k: v.double() for k, v in read_tensors(f).items()}, 0) for f in files]
            rows[name] = Row(name, records, found)
    return rows


def differences(one: Row, other: Row) -> dict[str, dict]:
    """The scores of a row against those of another, paired by seed; a model without a training seed serves all."""
    count = max(len(one.found), len(other.found))
    a, b = ((row.found * count if len(row.found) == 1 else row.found) for row in (one, other))
    return over_seeds(list(zip(a, b, strict=False)), SHOWN, reference(0).look)


def head(*names: str) -> list[str]:
    columns = ["", *names]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def ranking(clips: int) -> str:
    """Which differences of a table count."""
    if clips < MIN_CLIPS:
        return f"{clips} clips rank no models; {MIN_CLIPS} or more do (clips=N)."
    return COUNTS


def table(points: Sequence[Point], out: Path) -> str:
    """Compare every combination with the first one; write table.md and sweep.json."""
    rows = rows_of(points)
    if not rows:
        return ""
    first, *_ = rows.values()
    lines = head("cost", "seeds", *SHOWN, "against the first row")
    record = {}
    for name, row in rows.items():
        pairs = differences(row, first) if row is not first else {}
        said = ", ".join(f"{k} {d['verdict']}" for k, d in pairs.items() if k in LEADING)
        lines.append(f"| {name} | {row.cost} | {len(row.found)} | {' | '.join(row.cells())} | {said} |")
        record[name] = {"cost": row.cost, "scores": row.scores(), "clips": row.record["clips"]}
        record[name] |= {"two_deviations": row.spreads()}
        record[name] |= {"against_the_first": pairs}
    lines.append(f"\nCost: block evaluations per clip. {ranking(first.record['clips'])}")
    write_json(out / "sweep.json", record)
    write_text(out / "table.md", "\n".join(lines) + "\n")
    return "\n".join(lines)
