"""The table of a sweep: the scores of its models, and their differences over seeds and clips."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json, write_text
from fastlightgen.evaluation import latents
from fastlightgen.evaluation.sets import read_values
from fastlightgen.files.border import read_json
from fastlightgen.files.kinds import EVALUATION, SWEPT
from fastlightgen.metrics.intervals import MIN_CLIPS, Resampled
from fastlightgen.metrics.scores import GOALS as WANTED
from fastlightgen.metrics.scores import SCORES
from fastlightgen.metrics.seeds import over_seeds, spread
from fastlightgen.page.frontier import SCORE, against_cost
from fastlightgen.page.summary import cost
from fastlightgen.sweeps.points import SHAPES, Point
from fastlightgen.world.score import reference, resampled

SHOWN = ("adherence", "frechet", "kid", "recall", "texture", "persistence")
GOALS = {key: SCORES[key][2] for key in SHOWN}
COUNTS = "A difference counts if it exceeds two standard deviations of that difference."
ONE_SEED = "+-: two standard deviations over sets of clips; another training seed can differ by more (seeds=3)."
SEEDS = "+-: two standard deviations over training seeds and sets of clips."
FEW_SEEDS = "Of {} seeds this is no 95% interval: a difference just beyond it needs more seeds."
MANY = 10  # seeds; where they make all of the noise, two deviations of their mean are 92%
LEADING = ("adherence", "frechet")  # shown with their spread
AGAIN = "delete it, and the same command makes it again"


@dataclass
class Row:
    """A model that is measured: the record and the resampled scores of every seed; few clips have no resamples."""

    name: str
    records: list[dict[str, Any]]
    found: list[dict[str, Resampled]]
    goals: Mapping[str, str]  # of the scores that are shown

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
        return {k: [own[k] for own in scores] for k in self.goals if all(k in own for own in scores)}

    def means(self) -> dict[str, float]:
        """The mean of each score over the seeds."""
        return {k: sum(values) / len(values) for k, values in self.scores().items()}

    def spreads(self) -> dict[str, float]:
        """Two standard deviations of each mean, over seeds and sets of clips."""
        return {k: spread(self.found, k) for k in self.means() if all(k in own for own in self.found)}

    def cells(self) -> list[str]:
        means, spreads = self.means(), self.spreads()
        beside = {k: f" +- {short(spreads[k])}" for k in LEADING if k in spreads}
        return [f"{means[k]:.4g}{beside.get(k, '')}" if k in means else "" for k in self.goals]


def rows_of(points: Sequence[Point]) -> dict[str, Row]:
    """The models that are measured, by name, in the order of the points. Points of one name differ in their seed."""
    rows = {}
    for name, group in itertools.groupby(points, key=lambda point: point.name):
        own = [point for point in group if point.scores.exists()]
        if own:
            shapes = own[0].data == SHAPES
            records = [read_json(point.scores, EVALUATION if shapes else SWEPT, AGAIN) for point in own]
            files = [point.scores.with_suffix(".values.safetensors") for point in own]
            resample = resampled if shapes else latents.resampled
            found = [resample(read_values(file, AGAIN), 0) for file in files]
            rows[name] = Row(name, records, found, GOALS if shapes else latents.GOALS)
    return rows


def differences(one: Row, other: Row) -> dict[str, dict]:
    """The scores of a row against those of another, paired by seed; a model without a training seed serves all."""
    count = max(len(one.found), len(other.found))
    a, b = ((row.found * count if len(row.found) == 1 else row.found) for row in (one, other))
    real = reference(0).look if one.goals is GOALS else {}
    return over_seeds(list(zip(a, b, strict=False)), one.goals, real)


def head(*names: str) -> list[str]:
    columns = ["", *names]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def short(value: float, digits: int = 2, sign: str = "") -> str:
    """A few digits, and all of those before the point: 132, not 1.3e+02."""
    return f"{value:{sign}.{digits}g}" if abs(value) < 10**digits - 0.5 else f"{value:{sign}.0f}"


def footer(rows: Mapping[str, Row]) -> str:
    """What the columns of a table are, and which differences count."""
    goals, clips = next(iter(rows.values())).goals, next(iter(rows.values())).record["clips"]
    best = [
        f"{', '.join(k for k in goals if goals[k] == goal)}: {WANTED[goal]}" for goal in dict.fromkeys(goals.values())
    ]
    seeds = max(len(row.found) for row in rows.values())
    counted = f"{SEEDS if seeds > 1 else ONE_SEED} {COUNTS}{f' {FEW_SEEDS.format(seeds)}' * (1 < seeds < MANY)}"
    return f"Cost: block evaluations per clip. Scores: {'; '.join(best)}. {few(clips) or counted}"


def few(clips: int) -> str:
    """Why so many clips rank no models; "" if they do."""
    return f"{clips} clips rank no models; {MIN_CLIPS} or more do (clips=N)." if clips < MIN_CLIPS else ""


def cost_picture(title: str, rows: Mapping[str, Row]) -> str:
    """The distances against the cost, as SVG; "" if none is measured."""
    points = {}
    for name, row in rows.items():
        if SCORE in (means := row.means()):
            wide = row.spreads().get(SCORE, 0.0)
            points[name] = (row.cost, means[SCORE], means[SCORE] - wide, means[SCORE] + wide)
    return against_cost(title, "Frechet distance +- two standard deviations, less is better", points)


def write_shown(text: str, drawn: str, title: str, file: Path) -> None:
    """Write a table, and under it its picture, if there is one."""
    if drawn:
        write_text(file.with_suffix(".svg"), drawn)
        text += f"\n\n![{title}]({file.stem}.svg)"
    write_text(file, f"{text}\n")


def table(points: Sequence[Point], out: Path) -> str:
    """Compare every combination with the first one; write table.md, table.svg and sweep.json; return the text."""
    rows = rows_of(points)
    if not rows:
        return ""
    first, *_ = rows.values()
    lines = head("cost", "seeds", *first.goals, "against the first row")
    record = {}
    for name, row in rows.items():
        pairs = differences(row, first) if row is not first else {}
        said = ", ".join(f"{k} {d['verdict']}" for k, d in pairs.items() if k in LEADING)
        lines.append(f"| {name} | {row.cost} | {len(row.found)} | {' | '.join(row.cells())} | {said} |")
        record[name] = {"cost": row.cost, "scores": row.scores(), "clips": row.record["clips"]}
        record[name] |= {"two_deviations": row.spreads(), "against_the_first": pairs}
    lines.append(f"\n{footer(rows)}")
    write_json(out / "sweep.json", record)
    text, title = "\n".join(lines), "Distance against cost"
    write_shown(text, cost_picture(title, rows), title, out / "table.md")
    return text
