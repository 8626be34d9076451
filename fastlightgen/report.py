"""python -m fastlightgen.report run=DIR: writes a self-contained HTML page about a run."""

import base64
import io
import json
import math
import shlex
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastlightgen.atomic import write_text
from fastlightgen.config import Report, UserError, after_report, declared, main
from fastlightgen.config.fields import show
from fastlightgen.config.files import flatten, read_yaml
from fastlightgen.config.stages import DEFAULT, METHODS
from fastlightgen.metrics.importance import is_log
from fastlightgen.metrics.scores import GOALS, SAME, SCORES, best, check_versions, is_number, like_teacher, score

ORDER = ("real", "teacher", "teacher-few", "pruned", "stage2-few", "student")  # of the columns; others follow by name


def read(path: Path) -> dict:
    """Read a JSON file; a missing file counts as empty."""
    return parsed(path, path.read_text()) if path.is_file() else {}


def read_lines(path: Path) -> list[dict]:
    """Read a JSON lines file; a missing file counts as empty."""
    return [parsed(path, line) for line in path.read_text().splitlines()] if path.is_file() else []


def parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as err:
        raise UserError(f"{path}: is not valid JSON ({err}); delete it and make it again") from None


def read_run(run: Path) -> dict:
    """Read the configuration, logs, alarms, rankings and evaluations of a run folder, keyed by section."""
    folder = run / "evaluate"
    names = [p.stem for p in folder.glob("*.json") if p.stem != "speed"]
    names = [n for n in ORDER if n in names] + sorted(set(names) - set(ORDER))
    logs = {n: read_lines(run / f"stage{n}" / "metrics.jsonl") for n in (0, 2, 3)}
    found: dict[str, dict] = {
        "config": read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {},
        "importance": read(run / "stage1" / "importance.json"),
        "logs": {n: lines for n, lines in logs.items() if lines},
        "alarms": {n: lines for n in (0, 2, 3) if (lines := read_lines(run / f"stage{n}" / "alarms.jsonl"))},
        "evals": {n: read(folder / f"{n}.json") for n in names},
        "speed": read(folder / "speed.json"),
    }
    if not any(found.values()):
        raise UserError(
            f"run={run}: nothing to report; wanted config.yaml, stage1/importance.json, stageN/metrics.jsonl or "
            f"evaluate/*.json; make them with {command(run, 'all')}"
        )
    made = {folder / f"{n}.json": e for n, e in found["evals"].items()}
    if found["importance"].get("data_hash") == "shapes":
        made[run / "stage1" / "importance.json"] = found["importance"]
    check_versions(made, f"make it again with {command(run, 'all')} overwrite=true")
    blocks = [len(found["importance"].get("units", [])), *(e.get("num_blocks", 0) for e in found["evals"].values())]
    return found | {"blocks": max(blocks)}  # of the teacher


def command(run: Path, stage: int | str) -> str:
    return f"python -m fastlightgen.train stage={stage} run={shlex.quote(str(run))}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return an HTML table; cells must be HTML. The page highlights a cell that contains <b>."""
    lines = [f'<th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in rest)}' for first, *rest in rows]
    top = "".join(f'<th scope="col">{h}</th>' for h in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def details(title: str, head: list[str], rows: list[list[str]]) -> str:
    return f"<details><summary>{title}</summary>{table(head, rows)}</details>"


def fact(number: str, name: str, detail: str) -> str:
    return f'<div class="fact"><b>{number}</b><span>{name}</span><small>{detail}</small></div>'


# The functions below return the HTML of the page's sections.


def facts(found: dict) -> str:
    """The headline: speedup, share of blocks kept, adherence of the student."""
    student, teacher = found["evals"].get("student"), found["evals"].get("teacher")
    kept, out = (student or {}).get("kept_blocks") or found["importance"].get("kept"), ""
    if s := found["speed"]:
        detail = f"{s['theory']:.1f}× by counting blocks: {escape(s['theory_formula'])}"
        out += fact(f"{s['measured']:.1f}×", "faster, measured", detail)
    if kept and (teacher or found["importance"]):
        out += fact(f"{len(kept) / found['blocks']:.0%}", "of the blocks kept", f"{len(kept)} of {found['blocks']}")
    if student:
        detail = f"in {student['sampler']['evaluations']} network evaluations"
        if teacher:
            detail += f"; the teacher reaches {score(teacher, 'adherence')} in {teacher['sampler']['evaluations']}"
        out += fact(score(student, "adherence"), "adherence of the student", detail)
    return out


def sprite(path: Path) -> str:
    """Embed a clip file as a hidden PNG with a row per clip and a column per frame."""
    from PIL import Image
    from safetensors.numpy import load_file

    video = load_file(path)["video"]  # uint8 [K, F, H, W, 3]
    k, f, h, w, _ = video.shape
    file = io.BytesIO()
    Image.fromarray(video.transpose(0, 2, 1, 3, 4).reshape(k * h, f * w, 3)).save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img class="sprite" hidden alt="" data-frames="{f}" data-h="{h}" data-w="{w}" src="{source}">'


def clips(run: Path, evals: dict) -> str:
    """A grid of playing clips: a row per prompt, a column per model."""
    files = {n: run / "evaluate" / f"{n}.safetensors" for n in evals}
    evals = {n: e for n, e in evals.items() if e["shown"] and files[n].is_file()}
    if not evals:
        return ""
    heads = "".join(f'<div class="{"student" * (n == "student")}">{escape(e["title"])}</div>' for n, e in evals.items())
    rows = []
    longest: list[dict] = max((e["shown"] for e in evals.values()), key=len)  # models may show different numbers
    for k, clip in enumerate(longest):
        given = ' <span class="tag">first frame given</span>' if clip["has_first"] else ""
        has = [k < len(e["shown"]) for e in evals.values()]
        cells = "".join(f'<canvas data-s="{s}" data-k="{k}"></canvas>' if h else "<i></i>" for s, h in enumerate(has))
        rows.append(f'<div class="row"><p>{escape(clip["caption"])}{given}</p>{cells}</div>')
    grid = f'<div class="row head"><p></p>{heads}</div>{"".join(rows)}'
    return f'<div class="clips" style="--n:{len(evals)}">{grid}</div>{"".join(sprite(files[n]) for n in evals)}'


def cell(record: dict, key: str) -> str:
    """A score with its 95% interval, and "no difference" if the paired difference to the teacher may be 0."""
    text, out = SCORES[key][1], score(record, key)
    if ends := record.get("intervals", {}).get(key):
        low, high = ((text.format(end) if is_number(end) else "–") for end in ends)
        out += f'<small class="range">{low} to {high}</small>'
    return out + f'<small class="range">{SAME}</small>' * like_teacher(record, key)


def scores(evals: dict) -> str:
    """The table of scores, and adherence by attribute."""
    rows = []
    for key, (title, _, goal, meaning) in SCORES.items():
        if not any(key in e["scores"] for e in evals.values()):
            continue  # scores that ship with a model may be older, and diversity is optional
        top = best(key, evals)
        cells = [f"<b>{cell(e, key)}</b>" if n in top else cell(e, key) for n, e in evals.items()]
        rows.append([f"{title}<small>{meaning}; {GOALS[goal]}</small>", *cells])
    head = ["", *(escape(e["title"]) for e in evals.values())]
    names = dict.fromkeys(name for e in evals.values() for name in e["attributes"])
    shares = {n: [e["attributes"].get(n) for e in evals.values()] for n in names}
    parts = [[escape(n), *(f"{v:.1%}" if is_number(v) else "–" for v in row)] for n, row in shares.items()]
    notes = [f" {escape(e['title'])}: {escape(e['note'])}." for e in evals.values() if "note" in e]
    note = f"Measured on {max(e['clips'] for e in evals.values())} held-out clips.{''.join(notes)}"
    if any(e.get("intervals") for e in evals.values()):
        note += f" Ranges are 95% intervals. {SAME.capitalize()}: the paired difference to the teacher may be 0."
    return f'{table(head, rows)}<p class="note">{note}</p>{details("Adherence by statement", head, parts)}'


def importance(r: dict) -> str:
    return (
        f"<p>The error when one block is skipped, ± standard error over {r['num_samples']} samples. A bar starts "
        "at the error of the network with all blocks: its length is the damage. "
        f"Search: {escape(r['search'])}; score: {escape(r['score_kind'])}; dropped: {escape(show(r['pruned']))}.</p>"
        '<div class="scroll"><div id="blocks"></div></div>'
    )


def bars(r: dict) -> dict:
    """The data of the importance chart. The standard error of a single sample is nan, which is drawn as 0."""
    units = [u | {"stderr": u["stderr"] if is_number(u["stderr"]) else 0.0} for u in r.get("units", [])]
    return r and {"units": units, "kept": r["kept"], "baseline_score": r["baseline_score"], "log": is_log(r)}


def curves(logs: dict[int, list[dict]]) -> dict[int, dict[str, list]]:
    """The data of the curves, {stage: {key: [[step, value], ..]}}: at most 2000 points per key, five digits."""
    out = {}
    for stage, lines in logs.items():
        keys = dict.fromkeys(key for line in lines for key in line if key != "step")
        points = {k: [[ln["step"], float(f"{ln[k]:.5g}")] for ln in lines if is_number(ln.get(k))] for k in keys}
        out[stage] = {k: p[:: math.ceil(len(p) / 2000)] for k, p in points.items() if p}
    return out


def watched(found: dict) -> str:
    """Alarms, and a bar per stage that shows how the time of a step divides."""
    out = ""
    for stage, lines in found["alarms"].items():
        alarms = [f"step {a['step']}: {escape(a['alarm'])} ({a['value']:.3g}, usual {a['usual']:.3g})" for a in lines]
        out += f'<p class="alarm"><b>Alarms of stage {stage} ({len(alarms)})</b> {"; ".join(alarms[:8])}</p>'
    for stage, lines in found["logs"].items():
        names = [key for key in lines[-1] if key.startswith("share_")]
        shares = {key.removeprefix("share_"): sum(ln.get(key, 0.0) for ln in lines) / len(lines) for key in names}
        if shares:
            shares["rest"] = max(0.0, 1 - sum(shares.values()))  # rounding can bring the sum above 1
            parts = "".join(
                f'<i style="width:{v:.1%};opacity:{0.75**k:.2f}"></i>' for k, v in enumerate(shares.values())
            )
            text = ", ".join(f"{name} {v:.0%}" for name, v in shares.items())
            out += f'<p class="note">Time of stage {stage}: {text}</p><div class="times">{parts}</div>'
    return out


def followed(found: dict) -> str:
    """The method of each stage, described by its declaration."""
    out = ""
    for stage in found["logs"]:
        name = (found["config"].get(f"stage{stage}") or {}).get("method", DEFAULT)
        if name in METHODS[str(stage)]:  # a run may have used a method that is not installed here
            out += f'<p class="note">Stage {stage}: {escape(declared(str(stage), name).about)}</p>'
    return out


def sizes(found: dict) -> str:
    """The table of blocks, parameters, sampling plans and times, and the speedup."""
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
        seconds = f"{e['seconds_per_clip']:.4g} s <small>batch {e['batch']}</small>"
        rows.append([escape(e["title"]), blocks, params, plan, str(e["sampler"]["evaluations"]), seconds])
    out = table(["", "Blocks", "Parameters", "Steps", "Evaluations", "Time per clip"], rows)
    if s := found["speed"]:
        times = f"{s['teacher_seconds']:.4g} s → {s['student_seconds']:.4g} s per clip, batch {s['batch']}"
        formula = f"{escape(s['theory_formula'])}: network evaluations x blocks"
        cards = fact(f"{s['measured']:.1f}×", "measured", times), fact(f"{s['theory']:.1f}×", "in theory", formula)
        out += f'<div class="facts">{"".join(cards)}</div>'
    return out


def settings(config: dict) -> str:
    """The configuration: a collapsed table per stage, then versions and commit."""
    parts: list[str] = []
    plain: dict[str, object] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name != "versions":
            rows = [[escape(k), f"<code>{escape(show(v))}</code>"] for k, v in flatten(value).items()]
            parts.append(details(escape(name), ["Key", "Value"], rows))
        else:
            plain |= flatten({name: value})
    line = " · ".join(f"{escape(k.removeprefix('versions.'))} <code>{escape(show(v))}</code>" for k, v in plain.items())
    return f"<p>{line}</p>{''.join(parts)}" if config else ""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`: a single file that loads no other."""
    found = read_run(run)
    training = '<div id="curves"></div>' * bool(found["logs"]) + followed(found) + watched(found)
    if not {2, 3} <= found["logs"].keys():  # stage 0 is optional: the teacher may be given
        training += placeholder(run, "all")
    sections: dict[str, tuple[str, int | str]] = {  # title: (HTML, the stage that makes its input)
        "Clips": (clips(run, found["evals"]), "all"),
        "Scores": (found["evals"] and scores(found["evals"]), "all"),
        "Block importance": (found["importance"] and importance(found["importance"]), 1),
        "Training": (training, "all"),
        "Size and speed": (sizes(found), "all"),
        "Configuration": (settings(found["config"]), "all"),
    }
    ids = {title: title.split()[0].lower() for title in sections}
    data = json.dumps({"importance": bars(found["importance"]), "curves": curves(found["logs"])})
    page = Template(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8")).substitute(
        name=escape(run.resolve().name),
        nav="".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections),
        facts=facts(found),
        body="".join(
            f'<section id="{ids[title]}"><h2>{title}</h2>{content or placeholder(run, stage)}</section>'
            for title, (content, stage) in sections.items()
        ),
        data=data.replace("<", "\\u003c"),  # so that no string can close the script element
    )
    write_text(out := out or run / "report.html", page)
    return out


def placeholder(run: Path, stage: int | str) -> str:
    """The text of an empty section, with the command that fills it."""
    return f'<p class="missing">Not there yet: <code>{escape(command(run, stage))}</code> makes it.</p>'


def report(cfg: Report) -> None:
    print(write_report(Path(cfg.run), Path(cfg.out) if cfg.out else None))
    if following := after_report(Path(cfg.run)):
        print(f"next: {following}")


if __name__ == "__main__":
    main(report, "report")
