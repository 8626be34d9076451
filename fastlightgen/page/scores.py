"""The tables of scores, and of size and speed: a column or a row per model."""

from html import escape

from fastlightgen.metrics.scores import GOALS, SAME, SCORES, best, is_number, like_teacher, score
from fastlightgen.page.html import below, details, note, share, table
from fastlightgen.page.summary import cost, disagreement


def cell(record: dict, key: str) -> str:
    """A score with its 95% interval, and "no difference" if the paired difference to the teacher may be 0."""
    text, out = SCORES[key][1], score(record, key)
    if ends := record.get("intervals", {}).get(key):
        bare = text.partition("}")[0] + "}"  # without the unit, which the second number carries
        low, high = ((t.format(end) if is_number(end) else "–") for t, end in zip((bare, text), ends, strict=True))
        out += below(f"{low} to {high}")
    return out + below(SAME) * like_teacher(record, key)


def scores(evals: dict) -> str:
    """The table of scores under the cost of each model, and adherence by statement."""
    cells = [f"{cost(e):,}" if "sampler" in e else "–" for e in evals.values()]
    rows = [["Cost<small>block evaluations per clip</small>", *cells]]
    for key, (title, _, goal, meaning) in SCORES.items():
        if not any(key in e["scores"] for e in evals.values()):
            continue  # scores that ship with a model may be older, and diversity is optional
        top = best(key, evals)
        cells = [f"<b>{cell(e, key)}</b>" if n in top else cell(e, key) for n, e in evals.items()]
        rows.append([f"{title}<small>{meaning}; {GOALS[goal]}</small>", *cells])
    head = ["", *(escape(e["title"]) for e in evals.values())]
    names = dict.fromkeys(name for e in evals.values() for name in e["attributes"])
    parts = [[escape(n), *(share(e["attributes"].get(n)) for e in evals.values())] for n in names]
    notes = [f" {escape(e['title'])}: {escape(e['note'])}." for e in evals.values() if "note" in e]
    text = f"Measured on {max(e['clips'] for e in evals.values())} held-out clips.{''.join(notes)}"
    if any(e.get("intervals") for e in evals.values()):
        text += f" Ranges are 95% intervals. {SAME.capitalize()}: the paired difference to the teacher may be 0."
    return table("Scores", head, rows) + note(text) + details("Adherence by statement", head, parts)


def sizes(found: dict) -> str:
    """The table of blocks, parameters, sampling plans, cost and time, and how the times were measured."""
    made = {n: e for n, e in found["evals"].items() if "sampler" in e}
    if not made:
        return ""
    rows = []
    for e in made.values():
        kept = e["kept_blocks"] or range(e["num_blocks"])
        strip = "".join(f"<i{' class=on' * (i in kept)}></i>" for i in range(found["blocks"]))
        params = f"{e['num_params'] / 1e9:.2f} B" if e["num_params"] >= 1e9 else f"{e['num_params'] / 1e6:.2f} M"
        blocks = f'{e["num_blocks"]} <span class="strip" aria-hidden="true">{strip}</span>'
        plan = f"{e['sampler']['steps']} · {escape(e['sampler']['kind'])} · guidance {e['sampler']['guidance']:g}"
        seconds = (
            f"{e['seconds_per_clip']:.3g} s <small>batch {e['batch']}</small>"
            if {"seconds_per_clip", "batch"} <= e.keys()
            else "–"
        )
        rows.append(
            [escape(e["title"]), blocks, params, plan, str(e["sampler"]["evaluations"]), f"{cost(e):,}", seconds]
        )
    head = [
        "",
        "Blocks",
        "Parameters",
        "Steps",
        "Evaluations",
        "Cost<small>evaluations × blocks</small>",
        "Time per clip",
    ]
    out = table("Size and speed", head, rows)
    if s := found["speed"]:
        times = f"{s['teacher_seconds']:.3g} s → {s['student_seconds']:.3g} s per clip, batch {s['batch']}"
        out += note(
            f"Teacher to student: {s['theory']:.1f}× counted ({escape(s['theory_formula'])}), "
            f"{s['measured']:.1f}× measured ({times}). Times are medians; the models were timed in turn."
        )
    return out + disagreement(found["speed"])
