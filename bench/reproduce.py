"""Measure the claims on the built-in world: python bench/reproduce.py part=PART [rows=ROWS] [seeds=0,1] [clips=N].

part=train trains every row once per training seed; stages that rows share are trained once.
part=measure samples every row for the same held-out captions from the same noise, and scores it.
part=table compares rows by paired intervals, writes bench/results/world.json and prints a table.

rows: main, ablations, rivals, or names (main); seeds: of training (0,1,2,3,4); clips: held-out clips (2048). What is
done is skipped, so that a part can be interrupted, and can run twice at the same time. The settings were tuned with
training seed 99 and the clips of evaluate.seed=1, which no row uses.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measured_with import versions
from safetensors.torch import load_file

from fastlightgen.atomic import write_json
from fastlightgen.blocks import read_importance
from fastlightgen.config import Evaluate, preset
from fastlightgen.evaluate import load_subject, measure, write
from fastlightgen.flow import ladder
from fastlightgen.metrics.intervals import Resampled
from fastlightgen.metrics.scores import BETTER, SAME, SCORES, WORSE
from fastlightgen.models.folder.weights import read_json
from fastlightgen.stages.distill import DistillKeys
from fastlightgen.world.score import reference, resampled

OUT, RUNS = Path("bench/results/world.json"), Path("runs/reproduce")
EVAL_SEED, NOISES = 0, 8  # of the held-out clips and the teacher's shipped values; clips per caption for diversity
SHOWN = ("adherence", "frechet", "to_teacher", "kid", "recall", "diversity", "texture", "persistence")


@dataclass(frozen=True)
class Training:
    """One stage with the preset's settings (configs/model/tiny.yaml), and what this training changes."""

    stage: int
    after: str = ""  # the training whose result it starts from
    keys: tuple[str, ...] = ()
    inputs: dict[str, str] = field(default_factory=dict)  # other keys that name the model of a training


@dataclass(frozen=True)
class Row:
    """A model and how it is sampled."""

    title: str
    model: str  # a training, or a preset
    plan: dict[str, Any] = field(default_factory=dict)
    few: bool = False  # take the student's ladder and sampler
    keep: bool = False  # run only the blocks that Stage I keeps
    group: str = "main"


STUDENT = preset("tiny")["stage3"]
# The preset is for a demo of eight minutes. The rows train about twice as long.
FIRST, RATIO, UPDATES, STEPS = STUDENT["critic_start"], 2, 110, 300  # ratio and updates of Stage III, steps of Stage II
HALF = UPDATES // 2  # updates of the student in the ablations
REGRESSION = 2 * STEPS  # steps of Stage II that take about the time of Stages II and III


def updates(count: int, ratio: int = RATIO) -> tuple[str, ...]:
    """The length of a Stage III with `count` updates of the student.

    A cycle of shared rollouts costs 11.5 K + 3 K ratio block forwards (docs/method.md), K blocks kept: 14.5 K, 17.5 K
    and 26.5 K for ratios 1, 2 and 5.
    """
    return (f"iters={FIRST + count * ratio}", f"ratio={ratio}", "ema=0.9")


TRAININGS: dict[str, Training] = {
    "rank": Training(1),
    "stage2": Training(2, "rank", (f"iters={STEPS}",)),
    "student": Training(3, "stage2", updates(UPDATES)),
    # The guided regression alone, for the time of Stages II and III: Stage II with more steps.
    "regression": Training(2, "rank", (f"iters={REGRESSION}", "p=0.9")),
    # The paper's order: Stage II follows the plain teacher, and all guidance comes from Eq. 9.
    "stage2-plain": Training(2, "rank", (f"iters={STEPS}", "guided=1")),
    "student-plain": Training(3, "stage2-plain", (*updates(UPDATES), "beta1=2")),
    # Ablations: one key of Stage III changed, and half of its steps.
    "short": Training(3, "stage2", updates(HALF)),
    "beta2-0": Training(3, "stage2", (*updates(HALF), "beta2=0", "a2=0", "b2=0")),
    "beta2-.5": Training(3, "stage2", (*updates(HALF), "beta2=0.5")),
    "beta2-1": Training(3, "stage2", (*updates(HALF), "beta2=1")),
    "ratio-1": Training(3, "stage2", updates(round(HALF * 17.5 / 14.5), 1)),
    "ratio-5": Training(3, "stage2", updates(round(HALF * 17.5 / 26.5), 5)),
    "fresh": Training(3, "stage2", (*updates(HALF), "rollouts=fresh")),
    # Rivals, with the preset's schedule: their own settings are not tuned yet.
    "stage3-regression": Training(3, "stage2", ("method=regression",)),
    "dmd2": Training(3, "stage2", ("method=dmd2",)),
    "dmd2-no-gan": Training(3, "stage2", ("method=dmd2", "gan=0")),
    "lcm": Training(3, "stage2", ("method=lcm",)),
    "magicdistillation": Training(3, "stage2", ("method=magicdistillation",)),
}
ROWS: dict[str, Row] = {
    "teacher-50": Row("teacher, 50 steps", "tiny"),
    "teacher-28": Row("teacher, 28 steps", "tiny", {"steps": 28}),
    "teacher-4": Row("teacher, 4 steps", "tiny", few=True),
    "pruned-28": Row("blocks dropped, nothing trained, 28 steps", "tiny", {"steps": 28}, keep=True),
    "pruned-4": Row("blocks dropped, nothing trained, 4 steps", "tiny", few=True, keep=True),
    "stage2-28": Row("Stage II, pruned path, 28 steps", "stage2", {"steps": 28, "path": "pruned"}),
    "stage2-4": Row("Stage II, pruned path, 4 steps", "stage2", {"path": "pruned"}, few=True),
    "regression": Row("guided regression alone, 4 steps", "regression", {"path": "pruned"}, few=True),
    "student-plain": Row("student, Stage II without guidance", "student-plain"),
    "student": Row("student", "student"),
    "short": Row("student, half the steps of Stage III", "short", group="ablations"),
    "beta2-0": Row("beta2 = 0", "beta2-0", group="ablations"),
    "beta2-.5": Row("beta2 = .5", "beta2-.5", group="ablations"),
    "beta2-1": Row("beta2 = 1", "beta2-1", group="ablations"),
    "ratio-1": Row("1 critic update per student update, the same time", "ratio-1", group="ablations"),
    "ratio-5": Row("5 critic updates per student update, the same time", "ratio-5", group="ablations"),
    "fresh": Row("fresh rollouts, the same updates", "fresh", group="ablations"),
    "stage3-regression": Row("guided regression after Stage II", "stage3-regression", group="rivals"),
    "dmd2": Row("DMD2", "dmd2", group="rivals"),
    "dmd2-no-gan": Row("DMD2 without its discriminator", "dmd2-no-gan", group="rivals"),
    "lcm": Row("LCM", "lcm", group="rivals"),
    "magicdistillation": Row("MagicDistillation", "magicdistillation", group="rivals"),
}
PAIRS = (  # (row, the row that it is compared with)
    ("teacher-4", "teacher-50"),
    ("pruned-28", "teacher-28"),
    ("stage2-28", "teacher-28"),
    ("stage2-4", "teacher-28"),
    ("student", "teacher-50"),
    ("student", "teacher-4"),
    ("student", "stage2-4"),
    ("student", "regression"),
    ("student", "student-plain"),
    ("beta2-0", "short"),
    ("beta2-.5", "short"),
    ("beta2-1", "short"),
    ("ratio-1", "short"),
    ("ratio-5", "short"),
    ("fresh", "short"),
    ("student", "stage3-regression"),
    ("student", "dmd2"),
    ("student", "dmd2-no-gan"),
    ("student", "lcm"),
    ("student", "magicdistillation"),
)


def folder(name: str, seed: int) -> Path:
    """The model folder of a preset, or what a training leaves."""
    if name not in TRAININGS:
        return Path(name)
    stage = TRAININGS[name].stage
    return RUNS / f"{name}-{seed}" / f"stage{stage}" / ("importance.json" if stage == 1 else "model")


def train(name: str, seed: int, threads: int) -> None:
    """Train one stage for one seed, after what it starts from."""
    what = TRAININGS[name]
    for needed in (what.after, *what.inputs.values()):
        if needed:
            train(needed, seed, threads)
    run, made = RUNS / f"{name}-{seed}", folder(name, seed)
    if made.exists():
        return
    before = {2: "importance", 3: "stage2_model"}
    keys = [f"{before[what.stage]}={folder(what.after, seed)}"] if what.after else []
    keys += [f"{key}={folder(other, seed)}" for key, other in what.inputs.items()]
    words = [f"stage={what.stage}", f"run={run}", "model=tiny", "data=shapes", f"seed={seed}", f"threads={threads}"]
    words += ["dtype=bfloat16", "sample_every=0", *keys, *what.keys]
    start = time.time()
    subprocess.run([sys.executable, "-m", "fastlightgen.train", *words], check=True)
    write_json(run / "cost.json", {"core_minutes": (time.time() - start) * threads / 60, "words": words})


def measure_row(name: str, seed: int, clips: int, threads: int) -> None:
    """Score one row; its record and the values of every clip stay in RUNS/measured."""
    row, out = ROWS[name], RUNS / "measured" / f"{name}-{seed}.json"
    if out.is_file() and read_json(out)["clips"] >= clips:
        return
    cfg = Evaluate(
        model=str(folder(row.model, seed)),
        out=str(out),
        clips=clips,
        noises=NOISES,
        seed=EVAL_SEED,
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
    start = time.time()
    result = measure(cfg, subject)
    result.record |= {"plan": subject.plan, "core_minutes": (time.time() - start) * threads / 60}
    write(out, result)


def values_of(name: str, seed: int) -> dict[str, torch.Tensor]:
    return load_file(RUNS / "measured" / f"{name}-{seed}.values.safetensors")


@cache
def scores_of_row(name: str, seed: int, first: int) -> dict[str, Resampled]:
    """The scores of a row and their resamples. A preset has been measured once, beside the `first` seed."""
    own = seed if seed in seeds_of(name, [first, seed]) else first
    return resampled(values_of(name, own), EVAL_SEED, values_of("teacher-50", first)["features"])


def gap(score: Resampled, key: str) -> torch.Tensor:
    """The distance of a score and of its resamples [1 + R] to its goal; smaller is better."""
    values = torch.cat([torch.tensor([score.value]).double(), score.values])
    goals = {"high": -values, "low": values, "one": (values - 1).abs()}
    return goals[SCORES[key][2]] if SCORES[key][2] in goals else (values - reference(EVAL_SEED).look[key]).abs()


def compared(one: str, other: str, seeds: list[int]) -> dict[str, dict]:
    """Differences of two rows, trained with the same seeds and measured on the same clips.

    Their variance is that between training seeds, divided by their number, plus that between sets of clips, which all
    seeds share. A difference counts if it exceeds two standard deviations.
    """
    pairs = [(scores_of_row(one, s, seeds[0]), scores_of_row(other, s, seeds[0])) for s in seeds]
    out = {}
    for key in SHOWN:
        if not all(key in a and key in b for a, b in pairs):
            continue
        away = torch.stack([gap(a[key], key) - gap(b[key], key) for a, b in pairs])  # [seeds, 1 + R]
        between = away[:, 0].var().item() / len(seeds) if len(seeds) > 1 else 0.0
        two = 2 * (between + away.mean(0)[1:].var().item()) ** 0.5
        mean = away[:, 0].mean().item()
        verdict = SAME if abs(mean) <= two else WORSE if mean > 0 else BETTER
        out[key] = {"difference": mean, "two_deviations": two, "verdict": verdict}
    return out


def table(names: list[str], seeds: list[int]) -> None:
    rows: dict[str, Any] = {}
    lines = ["| | " + " | ".join(SHOWN) + " |", "|---|" + "---|" * len(SHOWN)]
    for name in names:
        own = seeds_of(name, seeds)
        records = [read_json(RUNS / "measured" / f"{name}-{s}.json") for s in own]
        found = [scores_of_row(name, s, seeds[0]) for s in own]
        scores = {k: [f[k].value for f in found] for k in SHOWN if k in found[0]}
        rows[name] = {"title": ROWS[name].title, "seeds": own, "clips": records[0]["clips"], "scores": scores}
        rows[name] |= {"sampler": records[0]["sampler"], "core_minutes": [r["core_minutes"] for r in records]}
        cells = [f"{sum(scores[k]) / len(own):.4g}" if k in scores else "" for k in SHOWN]
        lines.append(f"| {ROWS[name].title} | " + " | ".join(cells) + " |")
    pairs = [(a, b) for a, b in PAIRS if a in names and b in names]
    differences = {f"{a} against {b}": compared(a, b, seeds) for a, b in pairs}
    costs = {p.parent.name: read_json(p) for p in sorted(RUNS.glob("*/cost.json"))}
    write_json(OUT, {"rows": rows, "differences": differences, "trainings": costs, "measured with": versions()})
    print("\n".join(lines))
    for pair, scores in differences.items():
        texts = [f"{k} {d['difference']:+.3g} +- {d['two_deviations']:.2g}" for k, d in scores.items()]
        print(f"{pair}: {', '.join(texts)}")


def seeds_of(name: str, seeds: list[int]) -> list[int]:
    """A preset's weights do not depend on the training seed, unless Stage I chooses its blocks."""
    return seeds if ROWS[name].model in TRAININGS or ROWS[name].keep else seeds[:1]


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    asked, seeds = given.get("rows", "main"), [int(s) for s in given.get("seeds", "0,1,2,3,4").split(",")]
    names = [n for n, row in ROWS.items() if row.group == asked] or asked.split(",")
    threads = int(given.get("threads", torch.get_num_threads()))
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    (RUNS / "measured").mkdir(parents=True, exist_ok=True)
    part = given.get("part", "")
    if part == "table":
        return table(names, seeds)
    for seed in seeds:
        for name in [n for n in names if seed in seeds_of(n, seeds)]:
            if part == "train" and ROWS[name].model in TRAININGS:
                train(ROWS[name].model, seed, threads)
            elif part == "measure":
                measure_row(name, seed, int(given.get("clips", 2048)), threads)
            elif part not in ("train", "measure"):
                sys.exit(f"part={part}: wanted train, measure or table")


if __name__ == "__main__":
    main()
