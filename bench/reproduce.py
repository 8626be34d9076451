"""Measure the paper's claims in miniature: python bench/reproduce.py [seeds=0,1,2] [parts=teacher,stages,stage2,curve].

Writes bench/results/world.json.

Every number comes from 512 held-out clips of the built-in world. A seed decides training, clips and noise.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastlightgen.atomic import write_json
from fastlightgen.config import Evaluate
from fastlightgen.engine import checkpoint
from fastlightgen.engine.folder import commit
from fastlightgen.evaluate import draw, evaluate, load_subject
from fastlightgen.models.folder.weights import read_json, read_tensors
from fastlightgen.world.score import score

# Longer than the preset, whose settings keep `make demo` within minutes.
SETTINGS = (
    "stage2.iters=1000",
    "stage2.lr=6e-4",
    "stage2.lr_schedule=cosine",
    "stage3.iters=250",
    "stage3.lr_schedule=cosine",
)
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
        f"evaluate.seed={seed}",
        "model=tiny",
        "data=shapes",
        f"threads={torch.get_num_threads()}",
        *keys,
    ]
    subprocess.run(command, check=True)
    return run


def results() -> dict:
    return read_json(OUT) if OUT.is_file() else {}


def keep(name: str, seed: int, record) -> None:
    """Put one record into the file. Parts may run side by side, each in its own process."""
    found = results()
    found.setdefault(name, {})[str(seed)] = record
    versions = {"torch": str(torch.__version__), "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    write_json(OUT, found | {"measured with": versions})


def measured(seed: int, name: str, model: str, **plan) -> None:
    """Evaluate once and keep the record."""
    if str(seed) in results().get(name, {}):
        return
    out = RUNS / f"{name}-{seed}.json"
    evaluate(Evaluate(model=model, out=str(out), seed=seed, show=0, **plan))
    record = read_json(out)
    keys = ("plan", "scores", "attributes", "sampler", "num_blocks", "num_params", "seconds_per_clip", "clips")
    keep(name, seed, {k: record[k] for k in keys})


def teacher(seed: int) -> None:
    for steps in (28, 50, 4):
        measured(seed, f"teacher-{steps}", "tiny", steps=steps)


def stages(seed: int) -> None:
    run = train(seed, "stage=all", *SETTINGS, "save_every=50", "keep=100")  # `curve` reads the checkpoints
    for name in ("real", "pruned", "stage2-few", "student"):
        record = read_json(run / "evaluate" / f"{name}.json")
        keep(name, seed, {k: record[k] for k in ("scores", "attributes", "clips")})
    keep("speed", seed, read_json(run / "evaluate" / "speed.json"))


def stage2(seed: int) -> None:
    model = str(RUNS / f"seed-{seed}" / "stage2" / "model")
    measured(seed, "stage2-pruned-28", model, steps=28, path="pruned")
    measured(seed, "stage2-full-28", model, steps=28)


def curve(seed: int) -> None:
    """Score the student at the checkpoints that `stages` left, to find where it is best."""
    run = RUNS / f"seed-{seed}"
    cfg = Evaluate(model=str(run / "stage3" / "model"), out="unused", seed=seed, show=0, progress=False)
    subject = load_subject(cfg, cfg.model, "student", "student")
    points = []
    for step in checkpoint.steps(run / "stage3" / "checkpoints"):
        weights = read_tensors([checkpoint.path(run / "stage3" / "checkpoints", step) / "student.safetensors"])
        subject.model.load_state_dict(weights)
        clips, asked, _ = draw(cfg, subject, cfg.clips)
        points.append({"iteration": step} | score(clips, asked, seed)[0])
        print(json.dumps(points[-1]), flush=True)
    keep("curve", seed, points)


def table(found: dict) -> str:
    """Mean over the seeds, with the range if there are several."""
    lines = ["| | seeds | " + " | ".join(SHOWN) + " |", "|---|---|" + "---|" * len(SHOWN)]
    for name, by_seed in found.items():
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
    parts = {"teacher": teacher, "stages": stages, "stage2": stage2, "curve": curve}
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(given.get("threads", torch.get_num_threads())))
    for part in given.get("parts", ",".join(parts)).split(","):
        for seed in given.get("seeds", "0,1,2").split(","):
            parts[part](int(seed))
    print(table(results()))


if __name__ == "__main__":
    main()
