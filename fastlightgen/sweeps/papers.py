"""Tables and figures of the papers, on the built-in world: configs/papers/NAME.yaml, its rows, trends and sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.config import ConfigError
from fastlightgen.config.fields import clipped
from fastlightgen.config.files import preset, presets
from fastlightgen.config.layers import CONFIG
from fastlightgen.metrics.scores import BETTER, SAME, WORSE
from fastlightgen.page.figure import grid
from fastlightgen.page.frontier import SCORE  # decides whether a trend holds
from fastlightgen.sweeps.points import SHAPES, Part, Point, check, point_of, refusal, strings, under, unique
from fastlightgen.sweeps.table import (
    SHOWN,
    Row,
    cost_picture,
    differences,
    few,
    footer,
    head,
    rows_of,
    short,
    write_shown,
)
from fastlightgen.sweeps.work import cost_file, cost_of

SCORE_TITLE = "Frechet distance to real clips (less is better)"
BESIDE = "adherence"  # the score that is said beside it
SCORES_ARE = (
    "Verdicts go by the Frechet distance; a number after \"here\" is the first row's minus the second's: below 0, the "
    "first is nearer to real clips. Scores are means over the training seeds, on the same clips from the same noise."
)
CLAIMS = {"better": "better than", "same": "as good as"}  # of a paper
VERDICTS = {  # of our measurement of a claim; a difference within noise has its sign beside it
    "better": {BETTER: "Holds", WORSE: "Contradicted"},
    "same": {
        SAME: "Not contradicted",
        BETTER: "Contradicted, the first is better",
        WORSE: "Contradicted, the first is worse",
    },
    "asked": {SAME: "No difference", BETTER: "The first is better", WORSE: "The first is worse"},
}


@dataclass(frozen=True)
class Trend:
    """What the paper's numbers say of two rows."""

    one: str
    other: str
    kind: str  # better: the first is better; same: they are equal; asked: the paper does not compare them, we do


@dataclass(frozen=True)
class Paper:
    """A table or a figure of a paper."""

    name: str  # of its file
    title: str
    score: str  # what the paper's numbers are
    note: str  # how the miniature differs
    rows: dict[str, dict[str, Any]]  # name -> keys, stage, evaluate, paper
    keys: dict[str, str]  # of every row
    trends: list[Trend]
    figure: str  # "", grid: rows at [steps, share of the blocks], or cost


def read(name: str) -> Paper:
    """Read one file of configs/papers."""
    if name not in presets("papers"):
        known = ", ".join(presets("papers"))
        raise ConfigError(f"{name.replace('-', '=', 1)}: no such table or figure; there are {known}")
    found = preset(name, "papers")
    trends = [Trend(one, other, kind) for trend in found.get("trends", []) for kind, (one, other) in trend.items()]
    if "rows_of" in found:
        found["rows"] = preset(found["rows_of"], "papers")["rows"]
    assert all(trend.kind in VERDICTS for trend in trends), f"{name}: a trend that nothing judges"
    rows = {row: given or {} for row, given in found["rows"].items()}
    return Paper(
        name,
        found["title"],
        found["score"],
        found["note"],
        rows,
        strings(found.get("keys", {})),
        trends,
        found.get("figure", ""),
    )


def points_of(
    run: Path, paper: Paper, more: Mapping[str, str], seeds: Sequence[int], clips: int, known: dict[Path, Part]
) -> list[Point]:
    """The models of a table, for every seed. `more`: keys of the user, which stand over those of the file."""
    out = []
    check_more(paper, more)
    for name, row in paper.rows.items():
        last, plan = last_of(row), strings(row.get("evaluate", {}))
        words = [f"clips={clips}", *(f"{key}={value}" for key, value in plan.items())]
        for seed in seeds if last != "0" else seeds[:1]:
            keys = keys_of(paper, row, more)
            if last != "0":
                keys["seed"] = str(seed)
                check(taken(keys, more), last)
            out.append(point_of(run, name, keys, known, last, words))
    return out


def last_of(row: Mapping[str, Any]) -> str:
    """The last stage of a row's model; "0" for the model that all stages start from."""
    return str(row.get("stage", 3))


def keys_of(paper: Paper, row: Mapping[str, Any], more: Mapping[str, str]) -> dict[str, str]:
    """The keys of a row. A key of the user stands over the file's, also over those of the stages that take it."""
    return under({"model": "tiny", "data": SHAPES, **paper.keys, **strings(row.get("keys", {}))}, more)


def check_more(paper: Paper, more: Mapping[str, str]) -> None:
    """Raise if no row of a table takes a key of the user, or its value."""
    rows = [row for row in paper.rows.values() if last_of(row) != "0"]
    if data := next((k for k, v in more.items() if k.rpartition(".")[2] == "data" and v != SHAPES), ""):
        raise ConfigError(f"{clipped(data)}={clipped(more[data])}: a table of the paper is made on the built-in world")
    if given := next((k for k in more if k.rpartition(".")[2] == CONFIG), ""):
        raise ConfigError(f"{given}={clipped(more[given])}: a table of the paper has its own settings")
    for key, value in more.items():
        faults = [refusal(key, value, keys_of(paper, row, more), last_of(row)) for row in rows]
        if faults and all(faults):
            raise ConfigError(faults[-1])


def taken(keys: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """The keys that a stage of the row must take; those of the user may concern other rows."""
    return {key: value for key, value in keys.items() if key not in more}


def sentence(trend: Trend, paper: Paper, rows: Mapping[str, Row]) -> str:
    """Whether a trend of the paper holds here, by sign and by two standard deviations."""
    if not (trend.one in rows and trend.other in rows):
        return f"- {trend.one}, {trend.other}: not measured."
    found = differences(rows[trend.one], rows[trend.other])
    claim = claimed(trend, paper)
    if SCORE not in found:
        return f"- Not ranked: {claim}. {few(rows[trend.one].record['clips']) or 'A row has no distance.'}"
    d = found[SCORE]
    beside = found.get(BESIDE, {}).get("verdict", "not measured")
    number = f"{SCORE} {short(d['difference'], 3, '+')} +- {short(d['two_deviations'])}, {BESIDE} {beside}"
    return f"- {verdict(d, trend)}: {claim}; here {number}."


def claimed(trend: Trend, paper: Paper) -> str:
    """The paper's claim, with its numbers."""
    if trend.kind == "asked":
        return f"the paper does not compare {trend.one} with {trend.other}"
    numbers = [paper.rows[name].get("paper") for name in (trend.one, trend.other)]
    said = f" ({numbers[0]} and {numbers[1]})" if None not in numbers else ""
    return f"the paper has {trend.one} {CLAIMS[trend.kind]} {trend.other}{said}"


def verdict(difference: Mapping[str, Any], trend: Trend) -> str:
    """The difference is that of the distances to the goal: below 0, the first row is better.

    No difference beyond noise is no proof that two rows are equal: "Not contradicted", with the interval beside it.
    """
    word = difference["verdict"]
    if difference["difference"] == 0:
        return "No difference, the same numbers"
    if word == SAME and trend.kind == "better":
        return f"Within noise, {'the same' if difference['difference'] < 0 else 'the other'} sign"
    return VERDICTS[trend.kind][word]


def report(paper: Paper, points: Sequence[Point], out: Path) -> str:
    """Write NAME.md, NAME.json and the figure; return the text, which a terminal shows without the figure."""
    rows = rows_of(points)
    if not rows:
        return ""
    lines = [f"# {paper.title}", "", paper.note.strip(), "", *head(paper.score, "cost", "seeds", *SHOWN)]
    record: dict[str, Any] = {}
    for name, row in rows.items():
        number = paper.rows[name].get("paper", "")
        lines.append(f"| {name} | {number} | {row.cost} | {len(row.found)} | {' | '.join(row.cells())} |")
        record[name] = {"paper": number, "cost": row.cost, "clips": row.record["clips"], "scores": row.scores()}
        record[name] |= {"two_deviations": row.spreads()}
    sentences = [sentence(trend, paper, rows) for trend in paper.trends]
    lines += ["", *sentences, "", f"{SCORES_ARE} {footer(rows)}{hours(points)}"]
    write_json(out / f"{paper.name}.json", {"title": paper.title, "rows": record, "trends": sentences})
    write_shown("\n".join(lines), picture(paper, rows), paper.title, out / f"{paper.name}.md")
    return "\n".join(lines)


def picture(paper: Paper, rows: Mapping[str, Row]) -> str:
    """The figure of a table, as SVG; "" if it has none, or if nothing is measured."""
    values = {name: means[SCORE] for name, row in rows.items() if SCORE in (means := row.means())}
    if not values:
        return ""
    if paper.figure == "grid":
        places = {name: tuple(paper.rows[name]["at"]) for name in values}
        pairs = [(t.one, t.other) for t in paper.trends if t.kind == "same" and {t.one, t.other} <= set(places)]
        joined = [(places[one], places[other]) for one, other in pairs]
        return grid(paper.title, SCORE_TITLE, {places[name]: v for name, v in values.items()}, joined)
    return cost_picture(paper.title, rows) if paper.figure == "cost" else ""


def hours(points: Sequence[Point]) -> str:
    """What a table took; rows that tables share count in each."""
    items: list[Part | Point] = [*unique(points), *points]
    seconds = [found for item in items if (found := cost_of(cost_file(item))) is not None]
    if not seconds:
        return ""
    part = f" of {len(seconds)} of {len(items)} pieces" * (len(seconds) < len(items))
    return (
        f" Training and evaluation{part} took {sum(seconds) / 3600:.1f} hours by the clock; rows that other tables "
        "share are counted in each."
    )
