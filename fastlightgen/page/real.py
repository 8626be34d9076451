"""What `evaluate videos=` and `evaluate data=CACHE` measured: a table for each set of videos, and for each cache."""

from collections.abc import Mapping
from html import escape
from typing import Any

from fastlightgen.metrics.footage import meaning
from fastlightgen.metrics.intervals import MIN_CLIPS
from fastlightgen.metrics.scores import GOALS, SAME, is_number
from fastlightgen.page.html import below, details, note, table

OF_LATENTS = {  # score: its meaning
    "motion": "change between frames; 1: that of the clips",
    "detail": "change between neighbouring rows and columns; 1: that of the clips",
    "contrast": "variance of the latents; 1: that of the clips",
    "to_teacher": "squared distance to the teacher's latents from the same noise, divided by their square",
    "frechet": "Frechet distance to the clips",
    "kid": "kernel distance to the clips",
    "precision": "share of the samples that look like some clip",
    "recall": "share of the clips that look like some sample",
    "coverage": "share of the clips with a sample among their neighbours",
}


def real_clips(found: Mapping[str, Mapping[str, Any]]) -> str:
    """`found`: the records by the names of their files."""
    return "".join(videos(record) if "videos" in record else latents(record) for record in found.values())


def number(value: Any, form: str, ends: Any = None) -> str:
    """A score and its 95% interval."""
    text = form.format(value) if is_number(value) else "–"
    if ends and all(map(is_number, ends)):
        text += below(f"{form.format(ends[0])} to {form.format(ends[1])}")
    return text


def few(clips: int) -> str:
    return f" {clips} clips are too few to rank models by distances." if clips < MIN_CLIPS else ""


def known(score: str) -> tuple[str, str, str]:
    """Format, goal and meaning of a score; of one that this version does not have, its number alone."""
    try:
        return meaning(score)
    except KeyError:
        return "{:.4g}", "", ""


def videos(record: Mapping[str, Any]) -> str:
    """A column for the videos, one for the real ones; the clips that are least like the real ones."""
    rows = []
    for score, value in record["scores"].items():
        form, goal, text = known(score)
        told = f"<small>{escape(text)}; {GOALS.get(goal, goal)}</small>" if text else ""
        real = number(record["real_scores"].get(score), form)
        rows.append([f"{escape(score)}{told}", number(value, form, record["intervals"].get(score)), real])
    height, width, frames = record["size"]
    about = (
        f"{escape(record['videos'])}: {record['clips']} clips of {height}x{width}x{frames} at {record['fps']:g} frames "
        f"per second, against {record['real_clips']} of {escape(record['real'])}."
        f"{few(min(record['clips'], record['real_clips']))}"
    )
    odd = [
        [escape(row["clip"]), escape(row["score"]), number(row["value"], "{:.4g}"), number(row["real"], "{:.4g}")]
        for row in record["unusual"]
    ]
    shown = details("Clips least like the real ones", ["", "Score", "Its value", "Real clips"], odd) if odd else ""
    head = ["", escape(record["title"]), "Real clips"]
    return table(f"Scores of {escape(record['title'])}", head, rows) + note(about) + shown


def latents(record: Mapping[str, Any]) -> str:
    """A column for the student, one for its teacher if it was sampled too."""
    teacher, against = record.get("teacher"), record.get("against_teacher", {})
    models = [record, *([teacher] if teacher else [])]
    rows = []
    for score in record["scores"]:
        cells = [number(m["scores"].get(score), "{:.4g}", m["intervals"].get(score)) for m in models]
        if against.get(score, {}).get("verdict") == SAME:
            cells[0] += below(SAME)
        rows.append([f"{escape(score)}<small>{OF_LATENTS.get(score, '')}</small>", *cells])
    rows.append(["Time per clip", *(f"{m['seconds_per_clip']:.3g} s" for m in models)])
    about = f"Latents, against {record['clips']} clips of {escape(record['data'])} that training held out."
    name = f"Scores on {escape(record['data'])}"
    return table(name, ["", *(escape(m["title"]) for m in models)], rows) + note(about + few(record["clips"]))
