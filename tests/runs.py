"""A made-up run folder, and the page that a report makes of it, as a browser parses it."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

HOSTILE = """</script><img src=x onerror="alert('1')">&"""
RANKING = {
    "units": [
        {"name": f"blocks.{i}", "kind": "block", "index": i, "score": s, "stderr": 0.01}
        for i, s in enumerate((0.9, 0.2, 0.25))
    ],
    "baseline_score": 0.15,
    "kept": [0, 2],
    "pruned": [1],
    "search": "single_skip",
    "score_kind": "elbo",
    "num_samples": 16,
}
KEPT = {"teacher": None, "student": [0, 2]}
ADHERENCE = {"real": 0.991, "teacher": 0.874, "student": 0.912}


def video(seed):
    return np.random.default_rng(seed).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)


def record(name):
    scores = {"adherence": ADHERENCE[name], "saturation": {"real": 0.4, "teacher": 0.43, "student": 0.5}[name]}
    out = {"name": name, "title": name.title(), "clips": 32, "seed": 0, "attributes": {"colour": 0.5}}
    out |= {"scores": scores | {"tracking_error": float("nan")}}
    out |= {"shown": [{"caption": HOSTILE, "has_first": True}, {"caption": "a red ball", "has_first": False}]}
    if name != "real":
        kept = KEPT[name]
        out |= {"num_params": 1_230_000, "num_blocks": len(kept or range(3)), "kept_blocks": kept, "batch": 8}
        out |= {"sampler": {"kind": "ode", "steps": 50, "guidance": 2.0, "evaluations": 100}, "seconds_per_clip": 0.125}
    return out


def make_run(folder: Path) -> Path:
    """Write a run folder with three models, a ranking, logs and a speed, all made up."""
    for sub in ("stage1", "stage2", "stage3", "evaluate"):
        (folder / sub).mkdir(parents=True)
    (folder / "stage1" / "importance.json").write_text(json.dumps(RANKING))
    lines = [{"step": 1, "loss": 0.123456, "distill_pruned": 0.25}, {"step": 2, "loss": float("nan")}]
    (folder / "stage2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "stage3" / "metrics.jsonl").write_text('{"step": 1, "fake_loss": 0.5}\n')
    for i, name in enumerate(ADHERENCE):
        (folder / "evaluate" / f"{name}.json").write_text(json.dumps(record(name)))
        save_file({"video": video(i)}, folder / "evaluate" / f"{name}.safetensors")
    speed = {"theory": 37.5, "measured": 36.1, "teacher_seconds": 0.9, "student_seconds": 0.025, "batch": 8}
    (folder / "evaluate" / "speed.json").write_text(json.dumps(speed | {"theory_formula": "50 x 2 / (4 x 8/12)"}))
    settings = {"stage2": {"lr": 0.0003, "betas": [0.9, 0.999]}, "seed": 7, "versions": {"torch": "9.8.7"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"git_commit": "abc123"}))
    return folder


# What `evaluate videos=` and `evaluate data=CACHE` write, made up.
FOOTAGE = {
    "title": "made",
    "videos": "made",
    "real": "footage",
    "clips": 3,
    "real_clips": 9,
    "size": [96, 128, 8],
    "fps": 8.0,
    "network": None,
    "scores": {"movement": 16.7, "network_frechet": 12.345, "kid": None},
    "real_scores": {"movement": 21.3, "network_frechet": 0.5},
    "intervals": {"movement": [15.1, 18.2]},
    "unusual": [{"clip": "3.mp4", "score": "movement", "value": 0.0, "real": 21.3, "deviations": 4.0}],
}
LATENTS = {
    "title": "student",
    "data": "cache",
    "clips": 70,
    "scores": {"motion": 0.9123, "kid": 0.25},
    "intervals": {"motion": [0.8765, 0.9456]},
    "seconds_per_clip": 0.5,
    "teacher": {"title": "teacher", "scores": {"motion": 0.98}, "intervals": {}, "seconds_per_clip": 7.5},
    "against_teacher": {"motion": {"verdict": "no difference"}},
}


def add_real_clips(run: Path) -> Path:
    """Write both into a run folder."""
    (run / "evaluate").mkdir(parents=True, exist_ok=True)
    (run / "evaluate" / "made.json").write_text(json.dumps(FOOTAGE))
    (run / "evaluate" / "cache.json").write_text(json.dumps(LATENTS))
    return run


class Page(HTMLParser):
    """A page as a browser parses it: (tag, attributes), the text, the script elements."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text
        elif self.inside != "style":
            self.text += text + "|"
