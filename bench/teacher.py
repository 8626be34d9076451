"""Choose the guidance of the built-in world's teacher, and measure the scores that ship with it.

python bench/teacher.py part=sweep model=DIR [clips=256 steps=4,28 guidance=1,1.25,1.5,2,3]
    writes bench/results/teacher-guidance.json: which guidance has the smallest distance to the data?
python bench/teacher.py part=ship model=DIR [clips=2048]
    writes DIR/scores.json and the values of every clip, so that other models can be compared with this teacher

A part that is interrupted, or asked for more clips, goes on where it stopped.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from measured_with import versions
from safetensors.torch import load_file, save_file

from fastlightgen.atomic import write_json
from fastlightgen.config import Evaluate
from fastlightgen.evaluate import load_subject
from fastlightgen.models.folder.weights import digest, read_json
from fastlightgen.world.score import caption_spreads, clip_values, scores_of
from fastlightgen.world.shapes import WORLD
from fastlightgen.world.subject import Subject, draw

RUNS, CHUNK = Path("runs/teacher"), 128  # clips that one file of values holds
SWEEP_SEED, SHIP_SEED, NOISES = 1, 0, 8  # the guidance is chosen on clips that no published score uses
KEPT = ("adherence", "frechet", "kid", "recall", "texture", "persistence", "first_frame_psnr", "tracking_error")


def measured(cfg: Evaluate, subject: Subject) -> tuple[dict[str, torch.Tensor], dict[str, float], float]:
    """Values of clips 0 .. cfg.clips - 1 and adherence by attribute, chunk by chunk; and the seconds of one clip."""
    # Files of other weights or of another plan must not be taken for this teacher's.
    weights = digest(subject.folder / "diffusion_pytorch_model.safetensors")
    plan = hashlib.sha256(json.dumps(subject.plan).encode()).hexdigest()[:8]
    name = f"{weights}-{plan}-seed{cfg.seed}-noises{cfg.noises}"
    parts, attributes, seconds = [], [], []
    for first in range(0, cfg.clips, CHUNK):
        path = RUNS / f"{name}-{first}.safetensors"
        if not path.is_file():
            clips, asked, took = draw(cfg, subject, CHUNK, first=first)
            values, shares = clip_values(clips, asked, cfg.seed)
            more = {"attributes": torch.tensor(list(shares.values())), "seconds": torch.tensor([took])}
            if cfg.noises > 1:
                clips, asked, _ = draw(cfg, subject, CHUNK, cfg.noises, first)
                more["spread"] = caption_spreads(clips, asked, cfg.noises)
            save_file(values | more, path)
        part = load_file(path)
        attributes.append(part.pop("attributes"))
        seconds.append(part.pop("seconds").item())
        parts.append(part)
    names = ("colour", "kind", "direction", "speed", "change", "cast", "companion")
    shares = dict(zip(names, torch.stack(attributes).nanmean(0).tolist(), strict=True))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, shares, sum(seconds) / len(seconds)


def sweep(model: str, given: dict[str, str]) -> None:
    out, rows = Path("bench/results/teacher-guidance.json"), list[dict[str, Any]]()
    for steps in map(int, given.get("steps", "4,28").split(",")):
        for guidance in map(float, given.get("guidance", "1,1.25,1.5,2,3").split(",")):
            cfg = Evaluate(
                model=model,
                out="-",
                clips=int(given.get("clips", 256)),
                seed=SWEEP_SEED,
                steps=steps,
                guidance=guidance,
            )
            values, _, seconds = measured(cfg, load_subject(cfg, model, "teacher", "teacher"))
            scores = scores_of(values, cfg.seed)
            row = {k: round(scores[k], 4) for k in KEPT}
            rows.append({"steps": steps, "guidance": guidance, "clips": cfg.clips, "seconds": round(seconds, 3)} | row)
            print(rows[-1], flush=True)
    asked = {(row["steps"], row["guidance"]) for row in rows}
    others = read_json(out).get("rows", []) if out.is_file() else []
    rows += [row for row in others if (row["steps"], row["guidance"]) not in asked]
    rows.sort(key=lambda row: (row["steps"], row["guidance"]))
    write_json(out, {"rows": rows, "measured with": versions()})


def ship(model: str, given: dict[str, str]) -> None:
    cfg = Evaluate(model=model, out="-", clips=int(given.get("clips", 2048)), seed=SHIP_SEED, noises=NOISES, show=0)
    subject = load_subject(cfg, model, "teacher", "teacher")
    values, attributes, seconds = measured(cfg, subject)
    save_file({k: v.float() for k, v in values.items()}, subject.folder / "values.safetensors")
    record = {
        "plan": subject.plan,
        "seed": cfg.seed,
        "clips": cfg.clips,
        "noises": cfg.noises,
        "values": "values.safetensors",
        "attributes": attributes,
        "scores": scores_of(values, cfg.seed),
        "seconds_per_clip": seconds,
    }
    write_json(subject.folder / "scores.json", {"world": WORLD, "records": [record], "measured with": versions()})


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(given.get("threads", torch.get_num_threads())))
    torch.set_flush_denormal(True)
    parts = {"sweep": sweep, "ship": ship}
    if given.get("part") not in parts or "model" not in given:
        sys.exit(f"part, model: wanted part={' or '.join(parts)} and model=DIR")
    parts[given["part"]](given["model"], given)


if __name__ == "__main__":
    main()
