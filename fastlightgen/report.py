"""python -m fastlightgen.report run=DIR: writes a self-contained HTML page about a run."""

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from string import Template

import fastlightgen.page
from fastlightgen.atomic import write_text
from fastlightgen.config import Report, UserError, main
from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import read_run as read_run_config
from fastlightgen.engine.scores import measured
from fastlightgen.files import border, kinds
from fastlightgen.files.schema import Shape
from fastlightgen.metrics.scores import check_versions
from fastlightgen.page import clips, scores, summary, training
from fastlightgen.page.advice import next_step

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
    evals = read_evaluations(run / "evaluate")
    found: dict[str, dict] = {
        "config": read_run_config(run),
        "importance": read(run / "stage1" / "importance.json", kinds.RANKING),
        "logs": {n: lines for n, lines in logs.items() if lines},
        "alarms": {n: lines for n in STAGES if (lines := read_lines(run / f"stage{n}" / "alarms.jsonl", kinds.ALARMS))},
        "looks": {n: read_lines(run / f"stage{n}" / "samples.jsonl", kinds.METRICS) for n in STAGES},
        "card": read(run / "stage3" / "model" / "fastlightgen.json", kinds.CARD),
        "evals": evals,
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


def read_evaluations(folder: Path) -> dict[str, dict]:
    """The evaluations of a run in the order of their columns. A student that was evaluated alone holds its teacher."""
    evals = {p.stem: read(p, kinds.EVALUATION) for p in folder.glob("*.json") if p.stem != "speed"}
    if "teacher" in evals.get("student", {}):
        evals.setdefault("teacher", evals["student"]["teacher"])
    return {n: evals[n] for n in [*(n for n in ORDER if n in evals), *sorted(set(evals) - set(ORDER))]}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`: a single file that loads no other."""
    return write_page(run, read_run(run), out)


def write_page(run: Path, found: dict, out: Path | None) -> Path:
    """Write the page of what `read_run` found."""
    evals, logs, ranking = found["evals"], found["logs"], found["importance"]
    sections = {
        "Clips": clips.evaluated(run, evals),
        "Scores": evals and scores.scores(evals),
        "Previews": clips.during_training(run, found["looks"], len(evals)),
        "Block importance": ranking and training.importance(ranking),
        "Training": '<div id="curves"></div>' * bool(logs) + training.followed(found) + training.watched(found),
        "Size and speed": scores.sizes(found),
        "Configuration": training.settings(found["config"]),
    }
    sections = {title: content for title, content in sections.items() if content}
    ids = {title: title.split()[0].lower() for title in sections}
    data = json.dumps({"importance": training.bars(ranking), "curves": training.curves(logs)}, allow_nan=False)
    script = (PAGE / "script.js").read_text(encoding="utf-8")
    page = Template((PAGE / "page.html").read_text(encoding="utf-8")).substitute(
        style=(PAGE / "style.css").read_text(encoding="utf-8"),
        script=script,
        policy=policy(script),
        name=escape(run.resolve().name),
        nav="".join(f'<a href="#{ids[title]}">{title}</a>' for title in sections),
        answer=summary.sentence(found),
        missing=missing(run, found),
        facts=summary.facts(found),
        body="".join(
            f'<section id="{ids[title]}" aria-labelledby="{ids[title]}-title">'
            f'<h2 id="{ids[title]}-title">{title}</h2>{content}</section>'
            for title, content in sections.items()
        ),
        data=data.replace("<", "\\u003c"),  # so that no string can close the script element
    )
    write_text(out := out or run / "report.html", page)
    return out


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
    run = Path(cfg.run)
    found = read_run(run)
    print(write_page(run, found, Path(cfg.out) if cfg.out else None))
    _, command = following(run, found)
    if command:
        print(f"next: {command}")


if __name__ == "__main__":
    main(report, "report")
