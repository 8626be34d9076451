"""Measure how much an asynchronous save slows the steps beside it: python bench/bench_save.py [cases=WORD] [rounds=8].

Rounds of a few steps alternate: one round saves after its first step, the next does not save. The stall is the
difference of their times, as a share of one step. `copy` is the part of the stall in which the training thread copies
tensors. The steps use all cores, or all but one, which is then free for the writing thread. The goal is 5%.

Writes bench/results/save-cpu.json and prints the table. Run it on a quiet machine only.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_plan import CPU, stage_of
from measured_with import versions

from fastlightgen.atomic import write_json
from fastlightgen.config import load
from fastlightgen.engine.local import LocalEngine
from fastlightgen.models.folder.weights import read_json

OUT = Path("bench/results/save-cpu.json")
STEPS = 3  # in one round
CASES = {  # dim, feed-forward, blocks, latent, text tokens
    "6M, 2048 tokens": (256, 1024, 6, (8, 32, 32), 32),
    "36M, 2048 tokens": (512, 2048, 8, (8, 32, 32), 32),
}


def measure(shape: tuple, rounds: int) -> dict:
    cfg = load(["stage=0", "run=unused", "batch=1", "ema=0.99", "checkpointing=false"])
    stage, engine = stage_of(cfg, shape), LocalEngine(CPU, "float32")
    engine.prepare(stage)
    times: dict[bool, list[float]] = {True: [], False: []}
    copies, written = [], []

    def step(number: int) -> None:
        for update in stage.updates(number):
            engine.apply(update, number)

    with tempfile.TemporaryDirectory() as folder:
        step(0)
        for number in range(2 * rounds + 2):
            saves, began = bool(number % 2), time.perf_counter()
            step(1)
            if saves:
                start = time.perf_counter()
                saving = engine.save(Path(folder), number, 1, 0)
                copies.append(time.perf_counter() - start)
            for _ in range(STEPS - 1):
                step(1)
            times[saves].append(time.perf_counter() - began)
            if saves:
                late = saving.thread.is_alive()
                saving.wait()
                written.append(not late)
                size = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
    plain, saved = (statistics.median(times[k][1:]) for k in (False, True))  # the first round of each only warms up
    one = plain / STEPS
    return {
        "step_s": one,
        "checkpoint_bytes": size,
        "stall_s": saved - plain,
        "copy_s": statistics.median(copies[1:]),
        "stall_of_a_step": (saved - plain) / one,
        "spread_of_plain_rounds": (max(times[False][1:]) - min(times[False][1:])) / one,
        "whole_before_the_round_ended": all(written),
    }


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    torch.set_flush_denormal(True)
    found = read_json(OUT)["cases"] if OUT.is_file() else {}
    cores = os.cpu_count() or 1
    for case, shape in CASES.items():
        for threads in (cores, max(1, cores - 1)):
            name = f"{case}, {threads} of {cores} cores"
            if all(word in name for word in given.get("cases", "").split("+")):
                torch.set_num_threads(threads)
                found[name] = measure(shape, int(given.get("rounds", 8)))
                print(name, json.dumps({k: round(v, 4) for k, v in found[name].items()}), flush=True)
                write_json(OUT, {"measured with": versions(), "cases": found})
    print("| case | step s | checkpoint MB | stall s | of it the copy | stall of a step |\n|---|---|---|---|---|---|")
    for name, r in found.items():
        size = r["checkpoint_bytes"] / 1e6
        print(
            f"| {name} | {r['step_s']:.2f} | {size:.0f} | {r['stall_s']:.3f} | {r['copy_s']:.3f} "
            f"| {r['stall_of_a_step']:.1%} |"
        )


if __name__ == "__main__":
    main()
