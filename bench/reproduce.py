"""Measure the claims on the built-in world: python bench/reproduce.py part=PART [rows=ROWS] [seeds=0,1] [clips=N].

part=train trains every row once per training seed, in runs/reproduce; stages that rows share are trained once.
part=measure samples every row for the same held-out captions from the same noise. Its scores and the values of every
clip go to bench/results/world, so that rows of several days and machines can be compared.
part=both trains every row and measures it as soon as it is trained.
part=table compares measured rows by paired intervals, prints a table, and writes bench/results/world.json. Rows
that are not named stay in the file as they are.

rows: main, ablations, rivals, searches, fp8, or names (main); seeds: of training (0,1,2,3,4); clips: held-out clips
(512); noises: clips per caption, whose spread is the diversity (8; 1: do not measure it); at_once: processes (1), more
of them for a GPU, which one leaves idle; threads: of each. What is done is skipped, so that a part can be interrupted.
What a process prints goes to runs/reproduce/logs. The settings were tuned with training seed 99 and the clips of
evaluate.seed=1, which no row uses: rows=trials seeds=99 are those of the rivals and of the long recipe, and their table
is bench/results/rival-trials.json.
"""

import os
import signal
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measured_with import versions
from pool import Work, run
from safetensors.torch import load_file, save_file
from trainings import PAIRS, ROWS, STUDENT, TRAININGS, TUNED, TUNED_CLIPS, varies

from fastlightgen.atomic import write_json
from fastlightgen.blocks import read_importance
from fastlightgen.config import Evaluate
from fastlightgen.evaluate import load_subject, measure
from fastlightgen.flow import ladder
from fastlightgen.metrics.intervals import Resampled
from fastlightgen.metrics.scores import SCORES
from fastlightgen.metrics.seeds import over_seeds
from fastlightgen.models.folder.weights import read_json
from fastlightgen.stages.distill import DistillKeys
from fastlightgen.sweeps.processes import run_command
from fastlightgen.world.score import reference, resampled

OUT, MEASURED, RUNS = Path("bench/results/world.json"), Path("bench/results/world"), Path("runs/reproduce")
TRIALS, TRIED = Path("bench/results/rival-trials.json"), RUNS / "trials"
FIXED = 0  # stands for the training seed of rows that do not depend on it
EVAL_SEED, NOISES = 0, 8  # of the held-out clips and the teacher's shipped values; clips per caption for diversity
SHOWN = ("adherence", "frechet", "to_teacher", "kid", "recall", "diversity", "texture", "persistence")


def folder(name: str, seed: int) -> Path:
    """The model folder of a preset, or what a training leaves."""
    if name not in TRAININGS:
        return Path(name)
    stage = TRAININGS[name].stage
    return RUNS / f"{name}-{seed}" / f"stage{stage}" / ("importance.json" if stage == 1 else "model")


def train(name: str, seed: int, threads: int) -> None:
    """Train one stage for one seed. What it starts from is there."""
    what, run, began, before = TRAININGS[name], RUNS / f"{name}-{seed}", time.monotonic(), cpu_time()
    input_key = {2: "importance", 3: "stage2_model"}
    keys = [f"{input_key[what.stage]}={folder(what.after, seed)}"] if what.after else []
    keys += [f"{key}={folder(other, seed)}" for key, other in what.inputs.items()]
    words = [f"stage={what.stage}", f"run={run}", "model=tiny", "data=shapes", f"seed={seed}", f"threads={threads}"]
    words += ["dtype=bfloat16", "sample_every=0", "progress=false", *keys, *what.keys]
    run_command("train", words)
    cost: dict[str, Any] = {"core_minutes": (cpu_time() - before) / 60, "words": words}
    if torch.cuda.is_available():
        cost |= {"gpu": torch.cuda.get_device_name(), "minutes": (time.monotonic() - began) / 60}
    write_json(run / "cost.json", cost)


def needed(name: str) -> list[str]:
    """The trainings that one starts from."""
    return [other for other in (TRAININGS[name].after, *TRAININGS[name].inputs.values()) if other]


def cpu_time() -> float:
    """Seconds of all cores that this process has taken, on a machine that may have other work."""
    return sum(os.times()[:4])


def record_of(name: str, seed: int) -> Path:
    return (TRIED if seed == TUNED else MEASURED) / f"{name}-{seed}.json"


def measure_row(name: str, seed: int, clips: int, noises: int, threads: int) -> None:
    """Score one row; its record and the values of every clip stay in RUNS/measured."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    row, out = ROWS[name], record_of(name, seed)
    cfg = Evaluate(
        model=str(folder(row.model, seed)),
        out=str(out),
        clips=clips,
        noises=noises,
        seed=TUNED_CLIPS if seed == TUNED else EVAL_SEED,
        threads=threads,
        show=int(name == "teacher-50"),  # with show=0 the values that ship with the teacher would be measured again
        **row.plan,
    )
    subject = load_subject(cfg, cfg.model, name, row.title)
    if row.few:
        steps = DistillKeys().steps
        subject.plan |= {"times": ladder(steps, STUDENT["shift"]), "kind": STUDENT["sampler"]}
    if row.keep:
        subject.keep = read_importance(folder("rank", seed), subject.model.num_blocks)["kept"]
    before = cpu_time()
    result = measure(cfg, subject)
    cost = (cpu_time() - before) / 60
    result.record |= {
        "model": cfg.model,
        "plan": subject.plan,
        "core_minutes": cost,
        "trained": costs(row.model, seed),
        **versions(),
    }
    save_file({k: v.half() for k, v in result.values.items()}, out.with_suffix(".safetensors"))
    write_json(out, result.record)


def costs(name: str, seed: int) -> dict[str, dict]:
    """The command and the core minutes of each training that a model needs."""
    if name not in TRAININGS:
        return {}
    found = {k: v for other in needed(name) for k, v in costs(other, seed).items()}
    return found | {name: read_json(RUNS / f"{name}-{seed}" / "cost.json")}


def values_of(name: str, seed: int) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in load_file(MEASURED / f"{name}-{seed}.safetensors").items()}


@cache
def scores_of_row(name: str, seed: int) -> dict[str, Resampled]:
    """The scores of a row and their resamples."""
    own = seed if varies(name) else FIXED
    return resampled(values_of(name, own), EVAL_SEED, values_of("teacher-50", FIXED)["features"])


def compared(one: str, other: str, seeds: list[int]) -> dict[str, dict]:
    """Differences of two rows, trained with the same seeds and measured on the same clips."""
    pairs = [(scores_of_row(one, s), scores_of_row(other, s)) for s in seeds]
    return over_seeds(pairs, {k: SCORES[k][2] for k in SHOWN}, reference(EVAL_SEED).look)


def table(names: list[str], seeds: list[int]) -> None:
    """Compare the rows that are measured. A pair is compared over the training seeds that both rows have."""
    rows: dict[str, Any] = {}
    lines = ["| | seeds | " + " | ".join(SHOWN) + " |", "|---|" + "---|" * (len(SHOWN) + 1)]
    own = {n: [s for s in seeds_of(n, seeds) if (MEASURED / f"{n}-{s}.json").is_file()] for n in names}
    own = {name: found for name, found in own.items() if found}
    for name, found in own.items():
        records = [read_json(MEASURED / f"{name}-{s}.json") for s in found]
        resamples = [scores_of_row(name, s) for s in found]
        scores = {k: [f[k].value for f in resamples] for k in SHOWN if k in resamples[0]}
        rows[name] = {"title": ROWS[name].title, "seeds": found, "clips": records[0]["clips"], "scores": scores}
        rows[name] |= {key: records[0][key] for key in ("sampler", "trained")}
        rows[name]["core_minutes"] = [r["core_minutes"] for r in records]
        cells = [f"{sum(scores[k]) / len(found):.4g}" if k in scores else "" for k in SHOWN]
        lines.append(f"| {ROWS[name].title} | {len(found)} | " + " | ".join(cells) + " |")
    differences = {}
    for one, other in PAIRS:
        both = [s for s in seeds if all(s in own.get(n, []) or (n in own and not varies(n)) for n in (one, other))]
        both = both if varies(one) or varies(other) else both[:1]
        if both:
            differences[f"{one} against {other}"] = {"seeds": both, "scores": compared(one, other, both)}
    kept = read_json(OUT) if OUT.is_file() else {"rows": {}, "differences": {}}
    whole = {"rows": kept["rows"] | rows, "differences": kept["differences"] | differences}
    write_json(OUT, whole | {"measured with": versions()})
    print("\n".join(lines))
    for pair, found in differences.items():
        texts = [f"{k} {d['difference']:+.3g} +- {d['two_deviations']:.2g}" for k, d in found["scores"].items()]
        print(f"{pair} (seeds {found['seeds']}): {', '.join(texts)}")


def trials() -> None:
    """Write the scores of the trials that are measured; others stay as they are."""
    rows = read_json(TRIALS)["rows"] if TRIALS.is_file() else {}
    for name, row in ROWS.items():
        if row.group == "trials" and (file := record_of(name, TUNED)).is_file():
            record = read_json(file)
            scores = {k: record["scores"][k] for k in SHOWN if k in record["scores"]}
            rows[name] = {"keys": TRAININGS[name].keys, "clips": record["clips"], "scores": scores}
            rows[name]["core_minutes"] = record["trained"][name]["core_minutes"]
            print(f"{name}: {scores['adherence']:.3f} {scores['frechet']:.1f} {' '.join(TRAININGS[name].keys)}")
    write_json(
        TRIALS, {"training seed": TUNED, "evaluate.seed": TUNED_CLIPS, "rows": rows, "measured with": versions()}
    )


def seeds_of(name: str, seeds: list[int]) -> list[int]:
    return seeds if varies(name) else [FIXED]


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    asked, seeds = given.get("rows", "main"), [int(s) for s in given.get("seeds", "0,1,2,3,4").split(",")]
    names = [n for n, row in ROWS.items() if row.group == asked] or asked.split(",")
    clips, noises = int(given.get("clips", 512)), int(given.get("noises", NOISES))
    threads = int(given.get("threads", torch.get_num_threads()))
    for place in (MEASURED, TRIED):
        place.mkdir(parents=True, exist_ok=True)
    part, at_once = given.get("part", ""), int(given.get("at_once", 1))
    if at_once < 1:
        sys.exit(f"at_once={at_once}: wanted 1 or more processes")
    if part == "table":
        return trials() if asked == "trials" else table(names, seeds)
    if part not in ("train", "measure", "both"):
        sys.exit(f"part={part}: wanted train, measure, both or table")
    todo: dict[str, Work] = {}
    for name in names:  # what is named first is done first, for all seeds
        for seed in seeds if varies(name) else seeds[:1]:
            own = seed if varies(name) else FIXED
            if part != "train" and is_measured(name, own, clips):
                continue
            if part != "measure":
                add_training(todo, ROWS[name].model, seed, threads)
            if part != "train":
                add_measurement(todo, name, own, (clips, noises, threads))
    if failed := run(todo, at_once, RUNS / "logs"):
        sys.exit(f"not done: {', '.join(failed)}; see {RUNS / 'logs'}")


def add_training(todo: dict[str, Work], name: str, seed: int, threads: int) -> None:
    """Add what is not trained yet, after what it starts from."""
    if name in TRAININGS and not folder(name, seed).exists():
        for other in needed(name):
            add_training(todo, other, seed, threads)
        todo.setdefault(f"{name}-{seed}", Work(train, (name, seed, threads), after(todo, needed(name), seed)))


def is_measured(name: str, seed: int, clips: int) -> bool:
    out = record_of(name, seed)
    return out.is_file() and read_json(out)["clips"] >= clips


def add_measurement(todo: dict[str, Work], name: str, seed: int, how: tuple[int, int, int]) -> None:
    inputs = [ROWS[name].model, *(["rank"] if ROWS[name].keep else [])]
    todo[f"measure-{name}-{seed}"] = Work(measure_row, (name, seed, *how), after(todo, inputs, seed))


def after(todo: dict[str, Work], names: list[str], seed: int) -> tuple[str, ...]:
    return tuple(key for name in names if (key := f"{name}-{seed}") in todo)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what is running, as Ctrl-C does
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
