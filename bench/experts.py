"""Two experts on the built-in world: python bench/experts.py [threads=1] [clips=256] [seed=0] [tune=200] [short=N].

The teacher is made of the shipped one: both experts start from its weights, and each trains on (Stage 0, `tune` steps)
at the times of its own range. Stages I to III then make a student of each. The student is compared with the teacher by
paired intervals: the same held-out captions and noise. Writes bench/results/experts.json; the runs are in runs/experts.

What is done is skipped. short=N: a rehearsal with N steps of every stage, in runs/experts-short, which writes there.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measured_with import versions
from trainings import STEPS, UPDATES, updates

from fastlightgen.atomic import write_json
from fastlightgen.config import EXPERTS, Evaluate, find_preset_weights
from fastlightgen.evaluate import Result, load_subject, measure
from fastlightgen.models.folder.weights import read_card, read_json

OUT, RUNS = Path("bench/results/experts.json"), Path("runs/experts")
SHOWN = ("adherence", "frechet", "kid", "recall", "texture", "persistence")


def stages(runs: Path, tune: int, short: int) -> dict[str, list[str]]:
    """The commands by their names; the settings are those of bench/reproduce.py, for each expert."""
    weights, teacher = os.path.relpath(find_preset_weights("tiny")), runs / "teacher/stage0/model"
    student = ["model=" + str(teacher), f"run={runs / 'student'}"]
    # A gentle Stage 0: the weights are good already at the times where they are trained on.
    first = ["stage=0", "model=tiny-a14b", f"run={runs / 'teacher'}", f"init={weights}", f"iters={tune}", "lr=2e-4"]
    steps, walked = f"iters={STEPS}", [*updates(UPDATES)]
    if short:
        first[-2] = steps = f"iters={short}"
        walked = [f"iters={short}", "critic_start=0", "ratio=1", "ema=0.9"]
    return {
        "stage 0": [*first, "lr_schedule=cosine", "warmup=10", "ema=0.9"],
        "stage 1": ["stage=1", *student, *["clips=2"] * bool(short)],
        "stage 2": ["stage=2", *student, steps],
        "stage 3": ["stage=3", *student, *walked],
    }


def train(name: str, words: list[str], runs: Path, seed: int, threads: int) -> dict[str, Any]:
    """Run a stage for both experts, unless it is done; return its command and its core minutes."""
    record = runs / f"{name.replace(' ', '-')}.json"
    if not record.is_file():
        before = cpu_time()
        given = [*words, "data=shapes", f"seed={seed}", f"threads={threads}", "sample_every=0", "progress=false"]
        subprocess.run([sys.executable, "-m", "fastlightgen.train", *given], check=True)
        write_json(record, {"words": words, "core_minutes": (cpu_time() - before) / 60})
    found: dict[str, Any] = read_json(record)
    return found


def cpu_time() -> float:
    """Seconds of all cores that this process and its children have taken."""
    return sum(os.times()[:4])


def row(name: str, title: str, cfg: Evaluate, teacher: Result | None) -> tuple[Result, dict[str, Any]]:
    """Sample and score one model; return what the file of results holds of it."""
    before, subject = cpu_time(), load_subject(cfg, cfg.model, name, title)
    result = measure(cfg, subject, teacher)
    kept = {key: result.record[key] for key in ("title", "clips", "sampler", "note") if key in result.record}
    kept["blocks"] = {part: len(read_card(Path(cfg.model) / part)["kept_blocks"]) for part in EXPERTS}
    for key in ("scores", "intervals", "against_teacher"):
        found = result.record.get(key, {})
        kept[key] = {score: found[score] for score in (*SHOWN, "to_teacher") if score in found}
    return result, kept | {"core_minutes": (cpu_time() - before) / 60}


def main() -> None:
    given = {"threads": "1", "clips": "256", "seed": "0", "tune": "200", "short": "0"}
    given |= dict(word.split("=", 1) for word in sys.argv[1:])
    threads, clips, seed, tune, short = (int(given[key]) for key in ("threads", "clips", "seed", "tune", "short"))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    runs = RUNS.with_name(f"{RUNS.name}-short") if short else RUNS
    runs.mkdir(parents=True, exist_ok=True)
    trained = {name: train(name, words, runs, seed, threads) for name, words in stages(runs, tune, short).items()}

    models = {"teacher": runs / "teacher/stage0/model", "student": runs / "student/stage3/model"}
    common = {"out": "unused.json", "clips": clips, "noises": 1, "threads": threads, "show": 0}
    few: dict[str, Any] = {"steps": len(read_card(models["student"] / "low")["ladder"])}
    rows: dict[str, Any] = {}
    teacher, rows["teacher"] = row("teacher", "two experts", Evaluate(model=str(models["teacher"]), **common), None)
    cfg = Evaluate(model=str(models["teacher"]), **common, **few)
    _, rows["teacher-few"] = row("teacher-few", f"two experts, {few['steps']} steps", cfg, teacher)
    _, rows["student"] = row("student", "their students", Evaluate(model=str(models["student"]), **common), teacher)
    about = "both experts start from the weights of model=tiny and train on at their own times"
    record = {"teacher": about, "seed": seed, "trained": trained, "rows": rows, "measured with": versions()}
    write_json(runs / OUT.name if short else OUT, record)
    for name, found in rows.items():
        scores = ", ".join(f"{key} {value:.4g}" for key, value in found["scores"].items())
        against = {key: f"{d['difference']:+.3g}" for key, d in found["against_teacher"].items()}
        print(f"{name}: {scores}" + (f"; against the teacher {against}" if against else ""))


if __name__ == "__main__":
    main()
