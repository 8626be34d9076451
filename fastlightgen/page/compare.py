"""Several runs side by side: the sentence on top, the settings that differ, curves in one chart."""

from collections.abc import Mapping
from html import escape
from typing import Any

from fastlightgen.config.fields import show
from fastlightgen.config.files import flatten
from fastlightgen.metrics.scores import BETTER, SAME, is_number, score
from fastlightgen.page.frontier import SCORE
from fastlightgen.page.html import note, table
from fastlightgen.page.summary import INTERVAL, ONE_SEED, cost, count
from fastlightgen.page.training import curves

NOISE = f"{BETTER.capitalize()} or worse: {INTERVAL}, over clips; {ONE_SEED}."
UNRANKED = "not ranked: the clips differ or are too few, or their values are missing (evaluate it again)"
OWN = ("run", "hardware", "versions", "git_commit")  # keys of a configuration that always differ


def nearest(students: Mapping[str, dict]) -> str | None:
    """The student with the smallest distance to real clips; None if none has been evaluated."""
    distances = {n: d for n, e in students.items() if is_number(d := e["scores"].get(SCORE))}
    return min(distances, key=distances.__getitem__, default=None)


def sentence(students: Mapping[str, dict], pairs: Mapping[str, Mapping[str, dict]]) -> str:
    """Which student has the smallest distance to real clips, and which others are not worse beyond noise.

    `pairs`: other run -> score -> the paired difference of this student to it.
    """
    made = {n: e for n, e in students.items() if is_number(e["scores"].get(SCORE))}
    if (first := nearest(students)) is None:
        return "None of these runs has an evaluated student."
    shown = f"{score(made[first], SCORE)}, adherence {score(made[first], 'adherence')}, "
    shown += f"{cost(made[first])} block evaluations per clip"
    others = {n: f"{score(e, SCORE)}, {score(e, 'adherence')}" for n, e in made.items() if n != first}
    return against(first, "real clips", shown, others, pairs, {SCORE: "distance", "adherence": "adherence"})


def on_caches(records: Mapping[str, dict], pairs: Mapping[str, Mapping[str, dict]]) -> str:
    """The same for students that were measured on the held-out clips of a latent cache."""
    made = {n: e for n, e in records.items() if is_number(e["scores"].get(SCORE))}
    if (first := nearest(records)) is None:
        return ""
    shown = {n: f"{e['scores'][SCORE]:.4g}" for n, e in made.items()}
    others = {n: text for n, text in shown.items() if n != first}
    return against(first, f"the clips of {made[first]['data']}", shown[first], others, pairs, {SCORE: "distance"})


def against(
    first: str,
    real: str,
    shown: str,
    others: Mapping[str, str],
    pairs: Mapping[str, Mapping[str, dict]],
    named: Mapping[str, str],
) -> str:
    """The sentence about the student with the smallest distance, then one about each other student.

    The student is called nearest only if it is so beyond noise against every other. `shown` and `others`: its scores,
    and those of the others by name; `named`: the scores that are compared, and their names.
    """
    if not others:
        return f"<b>The distance of {escape(first)} to {escape(real)} is {escape(shown)}.</b>"
    won = all(pairs.get(name, {}).get(SCORE, {}).get("verdict") == BETTER for name in others)
    claim = f"is nearest to {real}" if won else f"has the smallest distance to {real}"
    out = f"<b>{escape(f'{first} {claim}')}</b>: Frechet distance {shown}."
    for name, scores in others.items():
        found = pairs.get(name, {})
        told = [f"{found[key]['verdict']} in {title}" for key, title in named.items() if key in found]
        said = " and ".join(told).replace(SAME, "not different") if SCORE in found else UNRANKED
        out += f" Against {escape(name)} ({scores}) it is {said}."
    return f"{out} <small>{NOISE}</small>"


def settings(configs: Mapping[str, dict]) -> str:
    """The settings that differ between the runs, a row for each key."""
    flat = {name: flatten({k: v for k, v in config.items() if k not in OWN}) for name, config in configs.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values if key.rpartition(".")[2] not in OWN)
    rows = []
    for key in keys:
        cells = [show(values[key]) if key in values else "" for values in flat.values()]
        if len(set(cells)) > 1:
            rows.append([escape(key), *(f"<code>{escape(cell)}</code>" * bool(cell) for cell in cells)])
    if not rows:
        return note("The runs have the same settings.")
    return table("Settings that differ", ["", *map(escape, configs)], rows)


def all_curves(logs: Mapping[str, dict[int, list[dict]]]) -> list[dict[str, Any]]:
    """The data of the curves, a set for each run."""
    return [{"name": name, "curves": curves(lines)} for name, lines in logs.items()]


def names_of(folders: list[str]) -> dict[str, str]:
    """Folder -> the shortest name that tells it apart: its last parts."""
    for length in range(1, 20):
        names = ["/".join(folder.rstrip("/").split("/")[-length:]) for folder in folders]
        if len(set(names)) == len(folders):
            return dict(zip(folders, names, strict=True))
    return {folder: folder for folder in folders}


def heading(names: Mapping[str, str]) -> str:
    return f"{count(len(names), 'run')} compared: {', '.join(names.values())}"
