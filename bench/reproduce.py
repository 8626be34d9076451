"""The paper's claims in miniature: python bench/reproduce.py seeds=0,1,2 [parts=teacher,stages,curve].

Writes bench/results/world.json.

Every number is measured on 512 held-out clips of the built-in world; a seed decides training, clips and noise.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from fastlightgen.config import Evaluate
from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import commit
from fastlightgen.evaluate import Subject, draw, evaluate, load_subject, write_json
from fastlightgen.metrics.score import score
from fastlightgen.models.weights import read_json, read_tensors

OUT, RUNS = Path("bench/results/world.json"), Path("runs/reproduce")
SHOWN = ("adherence", "first_frame_psnr", "frechet", "motion", "tracking_error", "sharpness", "saturation")


def train(seed: int, *keys: str) -> Path:
    run = RUNS / f"seed-{seed}"
    command = [
        sys.executable,
        "-m",
        "fastlightgen.train",
        f"run={run}",
        f"seed={seed}",
        "model=tiny",
        "data=shapes",
        *keys,
    ]
    subprocess.run(command, check=True)
    return run


def measured(results: dict, seed: int, name: str, model: str, **plan) -> None:
    """Evaluate once and keep the record under results[name][seed]."""
    if str(seed) in results.setdefault(name, {}):
        return
    out = RUNS / f"{name}-{seed}.json"
    evaluate(Evaluate(model=model, out=str(out), seed=seed, show=0, **plan))
    record = read_json(out)
    keys = ("scores", "attributes", "sampler", "num_blocks", "num_params", "seconds_per_clip", "clips")
    results[name][str(seed)] = {k: record[k] for k in keys}
    keep(results)


def keep(results: dict) -> None:
    write_json(OUT, results | {"machine": machine()})


def machine() -> dict:
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def teacher(results: dict, seed: int) -> None:
    for name, plan in (
        ("teacher-28", {"steps": 28}),
        ("teacher-50", {"steps": 50}),
        ("teacher-4", {"steps": 4}),
        ("teacher-4-stochastic", {"steps": 4, "sampler": "stochastic"}),
    ):
        measured(results, seed, name, "tiny", **plan)


def stages(results: dict, seed: int) -> None:
    run = train(seed, "stage=all", "evaluate.show=8")
    for name in ("real", "pruned", "stage2-few", "student"):
        record = read_json(run / "evaluate" / f"{name}.json")
        results.setdefault(name, {})[str(seed)] = {k: record[k] for k in ("scores", "attributes", "clips")}
    results.setdefault("speed-tiny", {})[str(seed)] = read_json(run / "evaluate" / "speed.json")
    keep(results)
    stage2 = str(run / "stage2" / "model")
    measured(results, seed, "stage2-pruned-28", stage2, steps=28, path="pruned")
    measured(results, seed, "stage2-full-28", stage2, steps=28)


def curve(results: dict, seed: int) -> None:
    """The student after every few updates: where Stage III is best, and how it goes on."""
    run = RUNS / f"seed-{seed}"
    cfg = Evaluate(model=str(run / "stage3" / "model"), out="unused", seed=seed, show=0, progress=False)
    subject: Subject = load_subject(cfg, cfg.model, "student", "student")
    points = []
    for step in checkpoint.steps(run / "stage3" / "checkpoints"):
        weights = read_tensors([checkpoint.path(run / "stage3" / "checkpoints", step) / "student.safetensors"])
        subject.model.load_state_dict(weights)
        clips, asked, _ = draw(cfg, replace(subject), cfg.clips)
        points.append({"iteration": step} | score(clips, asked, seed)[0])
        print(json.dumps(points[-1]), flush=True)
    results.setdefault("curve", {})[str(seed)] = points
    keep(results)


def table(results: dict) -> str:
    """Mean over seeds, with the range where there are several."""
    lines = ["| | seeds | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for name, by_seed in results.items():
        rows = [r["scores"] for r in by_seed.values() if isinstance(r, dict) and "scores" in r]
        if not rows:
            continue
        cells = []
        for key in SHOWN:
            values = [r[key] for r in rows]
            spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.4g}{spread}")
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    results = {k: v for k, v in read_json(OUT).items() if k != "machine"} if OUT.is_file() else {}
    parts = {"teacher": teacher, "stages": stages, "curve": curve}
    RUNS.mkdir(parents=True, exist_ok=True)
    for part in given.get("parts", "teacher,stages,curve").split(","):
        for seed in given.get("seeds", "0,1,2").split(","):
            parts[part](results, int(seed))
    print(table(results))


if __name__ == "__main__":
    main()
