"""evaluate videos=FOLDER real=FOLDER: measures any videos against real ones; needs no captions and no download."""

import math
from pathlib import Path
from typing import Any

import torch

from fastlightgen.atomic import write_json
from fastlightgen.config import Evaluate
from fastlightgen.data.lists import videos_in
from fastlightgen.engine.local import pick_device
from fastlightgen.evaluation.collect import cut_of, measure
from fastlightgen.evaluation.likeness import against_themselves, complete, numbers, statistics
from fastlightgen.evaluation.sets import intervals_of, scores_of
from fastlightgen.files.program import load_program
from fastlightgen.metrics.footage import meaning
from fastlightgen.metrics.i3d import read_i3d
from fastlightgen.metrics.intervals import MIN_CLIPS
from fastlightgen.metrics.network import Network
from fastlightgen.parallel.log import say
from fastlightgen.parallel.threads import set_threads


def network_of(cfg: Evaluate, device: torch.device) -> Network | None:
    """The feature network that the user names, if any."""
    if cfg.i3d:
        return Network(read_i3d(cfg.i3d, device), f"i3d={cfg.i3d}", device)
    if cfg.torchscript:
        program = load_program(cfg.torchscript, "torchscript", device)
        return Network(program, f"torchscript={cfg.torchscript}", device)
    return None


def evaluate_videos(cfg: Evaluate) -> None:
    """Measure the videos and the real ones, print a table, and write a JSON file."""
    set_threads(cfg.threads)
    device, rows = pick_device(cfg.device), {key: videos_in(getattr(cfg, key), key) for key in ("videos", "real")}
    network = network_of(cfg, device)
    cut = cut_of(cfg, rows["videos"])
    made, real = (measure(rows[key], cut, network, f"measuring {key}", cfg.progress) for key in ("videos", "real"))
    for key, found in (("videos", made), ("real", real)):
        if not found.names:
            name, why = next(iter(found.skipped.items()))
            raise ValueError(f"{key}={getattr(cfg, key)}: no clip can be measured ({name}: {why}); see size= and fps=")
    complete(real, real)
    worst, measured = complete(made, real), statistics(made, real)
    unusual: list[dict[str, Any]] = [
        {"clip": name, "score": score, "value": made.values[score][i], "real": mean, "deviations": deviations}
        for i, (name, (deviations, score, mean)) in enumerate(zip(made.names, worst, strict=True))
        if score
    ]
    record = {
        "title": cfg.videos,
        "videos": cfg.videos,
        "real": cfg.real,
        "clips": len(made.names),
        "real_clips": len(real.names),
        "size": [*cut.size, cut.frames],
        "fps": cut.fps,
        "network": network.name if network else None,
        "scores": scores_of(measured),
        "intervals": intervals_of(measured, cfg.seed, len((made.network or made.features)[0])),
        "real_scores": against_themselves(real),
        "unusual": sorted(unusual, key=lambda row: -row["deviations"])[: cfg.show],
        "skipped": {"videos": made.skipped, "real": real.skipped},
        "values": {"clip": made.names} | {name: x.tolist() for name, x in numbers(made).items()},
    }
    write_json(Path(cfg.out), record)
    for line in table(record):
        say(line)
    following = "the same command with videos= of another model, to compare"
    if unusual:
        following = (
            f"look at {unusual[0]['clip']}, the clip least like the real ones; `unusual` in {cfg.out} lists more"
        )
    say(f"next: {following}")


def table(record: dict) -> list[str]:
    """The lines that the command prints."""
    height, width, frames = record["size"]
    lines = [
        f"{record['videos']}: {record['clips']} clips of {height}x{width}x{frames} at {record['fps']:g} per second, "
        f"against {record['real_clips']} clips of {record['real']}",
        f"{'':22}{'videos':>12}{'real':>12}",
    ]
    for score, value in record["scores"].items():
        form, goal, text = meaning(score)
        own, theirs = (form.format(x) if x is not None and math.isfinite(x) else "-" for x in
                       (value, record["real_scores"].get(score)))  # fmt: skip
        lines.append(f"{score:22}{own:>12}{theirs:>12}  {text} ({goal})")
    if (fewest := min(record["clips"], record["real_clips"])) < MIN_CLIPS:
        lines.append(f"warning: {fewest} clips are too few to rank models by distances; wanted at least {MIN_CLIPS}")
    for row in record["unusual"][:3]:
        lines.append(f"unusual: {row['clip']}: {row['score']} {row['value']:.4g}, real clips {row['real']:.4g}")
    for key, skipped in record["skipped"].items():
        if skipped:
            name, why = next(iter(skipped.items()))
            lines.append(f"warning: {key}: {len(skipped)} skipped, the first: {name}: {why}")
    return lines
