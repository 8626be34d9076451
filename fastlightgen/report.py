"""python -m fastlightgen.report run=DIR: writes a self-contained HTML page about a run, or about several (runs=A,B)."""

import base64
import hashlib
import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from string import Template

from torch import Tensor

import fastlightgen.page
from fastlightgen.atomic import write_text
from fastlightgen.config import Report, UserError, main
from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import read_run as read_run_config
from fastlightgen.engine.scores import measured
from fastlightgen.evaluation import latents
from fastlightgen.evaluation.sets import read_values
from fastlightgen.files import border, kinds
from fastlightgen.files.schema import Shape
from fastlightgen.metrics.intervals import Resampled
from fastlightgen.metrics.scores import check_versions
from fastlightgen.page import clips, compare, scores, summary, training
from fastlightgen.page.advice import next_step
from fastlightgen.page.frontier import frontier
from fastlightgen.page.real import real_clips
from fastlightgen.world.score import compared, resampled

# Columns: what the student can be weighed against at its own number of steps stands beside it; others follow by name.
ORDER = ("real", "teacher", "pruned", "stage2-few", "teacher-few", "student")
AGAIN = "delete it and make it again"
STAGES = (0, 2, 3)  # that train
PAGE = Path(fastlightgen.page.__file__).parent


def read(path: Path, shape: Shape) -> dict:
    """Read a JSON file; a missing file counts as empty."""
    found: dict = border.read_json(path, shape, AGAIN) if path.is_file() else {}
    return found


def read_lines(path: Path, shape: Shape) -> list[dict]:
    """Read a JSON lines file; a missing file counts as empty. A last line that is half written is left out."""
    return list(border.read_lines(path, shape)) if path.is_file() else []


def read_run(run: Path) -> dict:
    """Read the configuration, logs, alarms, rankings and evaluations of a run folder, keyed by section."""
    logs = {n: read_lines(run / f"stage{n}" / "metrics.jsonl", kinds.METRICS) for n in STAGES}
    evals, real = read_evaluations(run / "evaluate")
    found: dict[str, dict] = {
        "config": read_run_config(run),
        "importance": read(run / "stage1" / "importance.json", kinds.RANKING),
        "logs": {n: lines for n, lines in logs.items() if lines},
        "alarms": {n: lines for n in STAGES if (lines := read_lines(run / f"stage{n}" / "alarms.jsonl", kinds.ALARMS))},
        "looks": {n: read_lines(run / f"stage{n}" / "samples.jsonl", kinds.METRICS) for n in STAGES},
        "card": read(run / "stage3" / "model" / "fastlightgen.json", kinds.CARD),
        "evals": evals,
        "real": real,
        "speed": read(run / "evaluate" / "speed.json", kinds.SPEED) or evals.get("student", {}).get("speed") or {},
    }
    if not any(value for key, value in found.items() if key != "looks"):
        raise UserError(
            f"run={run}: nothing to report; wanted config.yaml, stage1/importance.json, stageN/metrics.jsonl or "
            "evaluate/*.json; give the folder that was run= of a training"
        )
    versions = {run / "evaluate" / f"{n}.json": e for n, e in evals.items()}
    if found["importance"].get("data_hash") == "shapes":
        versions[run / "stage1" / "importance.json"] = found["importance"]
    check_versions(versions, "make it again with the command that made it")
    blocks = [len(found["importance"].get("units", [])), *(e.get("num_blocks", 0) for e in evals.values())]
    return found | {"blocks": max(blocks)}  # of the teacher


def saved(run: Path, config: dict) -> dict[int, str]:
    """How far the unfinished stages of a run have come: measured scores of Stage I, saved steps of the others."""
    known, total = measured(run / "stage1")
    out = {1: f"{known} of {total} scores of single blocks are measured"} if known else {}
    for stage in STAGES:
        steps = checkpoint.steps(run / f"stage{stage}" / "checkpoints")
        if steps and f"stage{stage}" in config:
            out[stage] = f"step {steps[-1]} of {config[f'stage{stage}'].get('iters')} is saved"
    return out


def following(run: Path, found: dict) -> tuple[str, str]:
    """What the run lacks first, and the command that comes next."""
    return next_step(run, found["config"], "student" in found["evals"], saved(run, found["config"]))


def read_evaluations(folder: Path) -> tuple[dict[str, dict], dict[str, dict]]:
    """What was measured on the built-in world, in the order of its columns, and on real clips, by name of the file.

    A student that was evaluated alone holds its teacher.
    """
    evals: dict[str, dict] = {}
    real: dict[str, dict] = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem != "speed":
            found = read(path, lambda value: shape_of(value)(value))
            (evals if shape_of(found) is kinds.EVALUATION else real)[path.stem] = found
    if "teacher" in evals.get("student", {}):
        evals.setdefault("teacher", evals["student"]["teacher"])
    return {n: evals[n] for n in [*(n for n in ORDER if n in evals), *sorted(set(evals) - set(ORDER))]}, real


def shape_of(value: object) -> Shape:
    """The shape of a file that `evaluate` writes: of videos, of a latent cache, or of the built-in world."""
    keys = value if isinstance(value, dict) else ()
    return kinds.FOOTAGE if "videos" in keys else kinds.LATENTS if "data" in keys else kinds.EVALUATION


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`: a single file that loads no other."""
    return write_page(run, read_run(run), out)


def clip_files(run: Path, evals: dict[str, dict]) -> dict[str, Path]:
    """Where an evaluation keeps the clips of each model."""
    return {name: run / "evaluate" / f"{name}.safetensors" for name in evals}


def write_page(run: Path, found: dict, out: Path | None) -> Path:
    """Write the page of what `read_run` found."""
    evals, logs, ranking = found["evals"], found["logs"], found["importance"]
    sections = {
        "Clips": clips.evaluated(clip_files(run, evals), evals),
        "Scores": evals and scores.scores(evals),
        "Real clips": real_clips(found["real"]),
        "Frontier": frontier(evals),
        "Previews": clips.during_training(run, found["looks"], len(evals)),
        "Block importance": ranking and training.importance(ranking),
        "Training": '<div id="curves"></div>' * bool(logs) + training.followed(found) + training.watched(found),
        "Size and speed": scores.sizes(found),
        "Configuration": training.settings(found["config"]),
    }
    data = {"importance": training.bars(ranking), "runs": compare.all_curves({"": logs})}
    top = {"answer": summary.sentence(found), "missing": missing(run, found), "facts": summary.facts(found)}
    name = str(Path(*run.resolve().parts[-2:]))
    return fill(out or run / "report.html", name, top, sections, data)


def fill(out: Path, name: str, top: dict[str, str], sections: dict[str, str], data: dict) -> Path:
    """Put the parts into the page. Sections without content are left out."""
    sections = {title: content for title, content in sections.items() if content}
    ids = {title: title.split()[0].lower() for title in sections}
    text, script = json.dumps(data, allow_nan=False), (PAGE / "script.js").read_text(encoding="utf-8")
    page = Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        top,
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=script,
        policy=policy(script),
        title=escape(f"FastLightGen: {name}"),
        nav="".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections),
        body="".join(
            f'<section id="{ids[title]}" aria-labelledby="{ids[title]}-title">'
            f'<h2 id="{ids[title]}-title">{title}</h2>{content}</section>'
            for title, content in sections.items()
        ),
        data=text.replace("<", "\\u003c"),  # so that no string can close the script element
    )
    write_text(out, page)
    return out


def write_comparison(folders: list[str], out: Path) -> Path:
    """Write one page about several runs: their students, and the teacher of the first."""
    names = compare.names_of(folders)
    found = {names[folder]: read_run(Path(folder)) for folder in folders}
    made = {n: f["evals"]["student"] for n, f in found.items() if "student" in f["evals"]}
    students = {name: record | {"title": name} for name, record in made.items()}
    first = folders[0]
    teachers = {n: e for n, e in found[names[first]]["evals"].items() if n.startswith("teacher")}
    evals = teachers | students
    where = clip_files(Path(first), teachers)
    where |= {names[f]: Path(f) / "evaluate" / "student.safetensors" for f in folders if names[f] in students}
    on_cache, files = cached({names[folder]: folder for folder in folders}, found)
    sections = {
        "Frontier": frontier(evals),
        "Clips": clips.evaluated(where, evals),
        "Scores": scores.scores(evals) if evals else "",
        "Real clips": real_clips(on_cache),
        "Settings that differ": compare.settings({name: f["config"] for name, f in found.items()}),
        "Training": '<div id="curves"></div>' * any(f["logs"] for f in found.values()),
        "Size and speed": scores.sizes(
            {"evals": evals, "speed": {}, "blocks": max(f["blocks"] for f in found.values())}
        ),
    }
    data = {"importance": {}, "runs": compare.all_curves({name: f["logs"] for name, f in found.items()})}
    answer = compare.sentence(students, paired(students, where, resampled, compared))
    if on_cache and not students:
        answer = compare.on_caches(on_cache, paired(on_cache, files, latents.resampled, latents.compared))
    top = {"answer": answer, "missing": "", "facts": ""}
    return fill(out, compare.heading(names), top, sections, data)


def cached(folders: dict[str, str], found: dict[str, dict]) -> tuple[dict[str, dict], dict[str, Path]]:
    """Of each run, what was measured of its student on the first run's latent cache, and the file of it."""
    records: dict[str, dict] = {}
    files: dict[str, Path] = {}
    for name, folder in folders.items():
        own = {stem: r for stem, r in found[name]["real"].items() if summary.is_cached(r)}
        students = [stem for stem, r in own.items() if "stage3" in Path(r.get("model", "")).parts]
        for stem in [*students, *own]:
            first = next(iter(records.values()), own[stem])
            if name not in records and own[stem].get("data_hash") == first.get("data_hash"):
                records[name], files[name] = own[stem] | {"title": name}, Path(folder) / "evaluate" / f"{stem}.json"
    return records, files


Scores = dict[str, Resampled]


def paired(
    students: dict[str, dict],
    files: dict[str, Path],
    resample: Callable[[dict[str, Tensor], int], Scores],
    compare_two: Callable[[Scores, Scores, int], dict[str, dict]],
) -> dict[str, dict]:
    """The paired differences of the nearest student to the others that were measured on the same clips."""
    values = {n: files[n].with_suffix(".values.safetensors") for n in students}
    if (first := compare.nearest(students)) is None or not values[first].is_file():
        return {}
    seed, count = students[first].get("seed", 0), students[first]["clips"]
    same = [n for n, e in students.items() if (e.get("seed", 0), e["clips"]) == (seed, count) and values[n].is_file()]
    found = {n: resample(read_values(values[n], AGAIN), seed) for n in same}
    return {n: compare_two(found[first], found[n], seed) for n in same if n != first}


def policy(script: str) -> str:
    """What the page may do: run its own script, use its own styles, show pictures that it holds. Nothing else."""
    own = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    rules = ("default-src 'none'", f"script-src 'sha256-{own}'", "style-src 'unsafe-inline'", "img-src data:")
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def missing(run: Path, found: dict) -> str:
    """The paragraph about what the run lacks first, with the command that makes it, if one is known to work."""
    text, command = following(run, found)
    shown = f": <code>{escape(command)}</code>" if command else "."
    return f'<p class="missing">{text}{shown}</p>' if text else ""


def report(cfg: Report) -> None:
    if cfg.runs:
        folders = [name.strip() for name in cfg.runs.split(",") if name.strip()]
        print(page := write_comparison(folders, Path(cfg.out or "runs.html")))
        print(f"next: open {page} in a browser")
        return
    run = Path(cfg.run)
    found = read_run(run)
    print(page := write_page(run, found, Path(cfg.out) if cfg.out else None))
    _, command = following(run, found)
    print(f"next: {command or f'open {page} in a browser'}")


if __name__ == "__main__":
    main(report, "report")
