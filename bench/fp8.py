"""Measure the error of fp8=frozen on the built-in world: python bench/fp8.py part=PART [KEY=VALUE ...].

part=teacher compares the x0 predictions of the shipped teacher with and without float8, over noise levels, on held-out
clips (clips=64). part=train runs Stages II and III without it and with it, from the same ranking and the same Stage II
model, with the same draws, and compares their losses (steps=100; batch=N replaces the preset's). part=rank compares two
rankings of Stage I. What is done in the folder (run=runs/fp8) is skipped. All write bench/results/fp8.json.

On a CPU float8 is emulated: these are its numbers, not its speed.
"""

import copy
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measured_with import versions
from torch import Tensor

from fastlightgen import flow
from fastlightgen.atomic import write_json
from fastlightgen.engine.log import read_metrics
from fastlightgen.models.float8 import in_float8
from fastlightgen.models.folder.networks import trained_folder
from fastlightgen.models.folder.weights import load_model, read_json
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.scores import x0_error
from fastlightgen.world.source import ShapesSource

OUT = Path("bench/results/fp8.json")
LEVELS = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98)
AT_ONCE, DRAWS = 16, 17  # clips in one prediction; the purpose of these random draws
KINDS = ("off", "frozen")


def teacher(given: dict[str, str]) -> dict[str, Any]:
    """Rows per type and noise level: x0 error (Eq. 4) without and with float8, and the change of the prediction."""
    clips, source = int(given.get("clips", 64)), ShapesSource(0)
    plain = load_model(trained_folder("tiny")).requires_grad_(False)
    nets = {"off": plain, "frozen": in_float8(copy.deepcopy(plain))}
    rows = []
    for dtype in ("float32", "bfloat16"):
        for level in LEVELS:
            found = [predict(nets, source, first, level, dtype) for first in range(0, clips, AT_ONCE)]
            off, frozen, change, size = (torch.cat(parts).mean().item() for parts in zip(*found, strict=True))
            rows.append({"dtype": dtype, "t": level, "x0_error": off, "x0_error_fp8": frozen})
            rows[-1] |= {"increase": frozen / off - 1, "relative_change_of_x0": (change / size) ** 0.5}
            print(rows[-1], flush=True)
    means = {}
    for dtype in ("float32", "bfloat16"):
        of_type = [row for row in rows if row["dtype"] == dtype]
        off, frozen = (sum(row[key] for row in of_type) for key in ("x0_error", "x0_error_fp8"))
        means[dtype] = frozen / off - 1
    return {"clips": clips, "rows": rows, "increase of the mean x0 error": means}


@torch.no_grad()
def predict(nets: dict, source: ShapesSource, first: int, level: float, dtype: str) -> tuple[Tensor, ...]:
    """Per clip: both x0 errors, the mean square of the change of x0, and that of x0 itself."""
    batch = source.held_out(first, AT_ONCE)
    noise = normal_like(batch.x0, generator(0, DRAWS, first, round(100 * level)))
    t = torch.full((AT_ONCE,), level)
    x_t = flow.add_noise(batch.x0, noise, t)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        v = {kind: net(x_t, t, batch.cond).float() for kind, net in nets.items()}
    x0 = [flow.x0_from_velocity(x_t, v[kind], t) for kind in KINDS]
    squares = ((x0[1] - x0[0]).square().flatten(1).mean(1), x0[0].square().flatten(1).mean(1))
    return (*(x0_error(v[kind], x_t, t, batch.x0) for kind in KINDS), *squares)


def stage(given: dict[str, str], number: int, kind: str, *words: str) -> Path:
    """Run a stage with fp8=KIND, unless it is done; return its folder."""
    run = Path(given.get("run", "runs/fp8")) / kind
    command = [sys.executable, "-m", "fastlightgen.train", f"stage={number}", "model=tiny", f"fp8={kind}", f"run={run}"]
    subprocess.run([*command, "threads=1", "progress=false", *words], check=True)
    return run / f"stage{number}"


def rank(given: dict[str, str]) -> dict[str, Any]:
    """Stage I's x0 errors per block and the blocks that it drops, without and with float8."""
    off, frozen = (read_json(stage(given, 1, kind) / "importance.json") for kind in KINDS)
    baselines = [found["baseline_score"] for found in (off, frozen)]
    return {
        "baseline": dict(zip(KINDS, baselines, strict=True)) | {"increase": baselines[1] / baselines[0] - 1},
        "scores": {k: [u["score"] for u in r["units"]] for k, r in zip(KINDS, (off, frozen), strict=True)},
        "dropped": {kind: found["pruned"] for kind, found in zip(KINDS, (off, frozen), strict=True)},
    }


def train(given: dict[str, str]) -> dict[str, Any]:
    """Losses with and without float8, with the same seed and draws."""
    ranking, steps = stage(given, 1, "off") / "importance.json", given.get("steps", "100")
    usual = [f"iters={steps}", "log_every=1", "sample_every=0", f"save_every={steps}"]
    usual += [f"batch={given['batch']}"] if "batch" in given else []
    second = [stage(given, 2, kind, f"importance={ranking}", *usual) for kind in KINDS]
    third = [stage(given, 3, kind, f"stage2_model={second[0] / 'model'}", *usual) for kind in KINDS]
    logs = {"stage2": second, "stage3": third}
    found = {name: curves(*(read_metrics(run / "metrics.jsonl") for run in runs)) for name, runs in logs.items()}
    return {"steps": int(steps), "batch": given.get("batch", "preset's")} | found


def curves(off: list[dict], frozen: list[dict]) -> dict[str, Any]:
    """Per logged number: its mean without and with float8, and the mean and the spread of the differences by step."""
    out: dict[str, Any] = {}
    numbers = sorted({key for line in off for key in line} - {"step", "sec_per_step"})
    for key in (key for key in numbers if "lr" not in key and not key.startswith("share_")):
        pairs = [(a[key], b[key]) for a, b in zip(off, frozen, strict=True) if key in a and key in b]
        a, b = torch.tensor(pairs, dtype=torch.float64).unbind(1)
        d = b - a
        out[key] = {"lines": len(a), "off": a.mean().item(), "frozen": b.mean().item(), "difference": d.mean().item()}
        if len(a) > 1:
            out[key] |= {"relative": (d.mean() / a.mean()).item(), "spread": d.std().item()}
            last = slice(-max(1, len(a) // 5), None)
            out[key]["last fifth"] = {"off": a[last].mean().item(), "frozen": b[last].mean().item()}
    return out


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    parts = {"teacher": teacher, "rank": rank, "train": train}
    if given.get("part") not in parts:
        sys.exit("part: wanted part=teacher, part=rank or part=train")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found = parts[given["part"]](given)
    used = sum(resource.getrusage(who).ru_utime for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found |= {"command": f"python bench/fp8.py {' '.join(sys.argv[1:])}", "cpu minutes": round(used / 60, 1)}
    record = read_json(OUT) if OUT.is_file() else {}
    write_json(OUT, record | {given["part"]: found | {"measured with": versions()}})


if __name__ == "__main__":
    main()
