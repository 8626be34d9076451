"""Compare the planner with memory of real steps on this CPU: python bench/bench_plan.py [cases=WORD+WORD] [again=1].

Writes bench/results/plan-cpu.json and prints the table. Every case runs in its own processes: a Wan network with random
weights trains two iterations with the engine's own code. The peak of resident memory (VmHWM, reset through
/proc/self/clear_refs once AdamW has its states) is compared with the plan of the same configuration.

MALLOC_MMAP_THRESHOLD_ makes glibc give freed memory back, because the planner does not count memory that glibc keeps.
Cases named `heap` leave it out.
"""

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from measured_with import versions

from fastlightgen.atomic import write_json
from fastlightgen.config import load
from fastlightgen.data.source import Batch
from fastlightgen.engine.local import LocalEngine
from fastlightgen.models.base import Cond
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import build, read_json
from fastlightgen.models.lora import attach_lora
from fastlightgen.parallel import ranks
from fastlightgen.planner.budget import budget
from fastlightgen.planner.fit import plan_of
from fastlightgen.planner.step import dropped, undropped
from fastlightgen.rng import generator, rows
from fastlightgen.stages.distill import Distill
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.prune import Prune
from fastlightgen.stages.sweep import score_sets
from fastlightgen.stages.teacher import Teacher

OUT, CPU = Path("bench/results/plan-cpu.json"), torch.device("cpu")
NETS = {  # dim, feed-forward, blocks, latent, text tokens
    "53M, 1024 tokens": (512, 2048, 12, (4, 32, 32), 64),
    "53M, 256 tokens": (512, 2048, 12, (4, 16, 16), 64),
    "287M, 256 tokens": (1024, 4096, 16, (4, 16, 16), 64),
    "499M, 256 tokens": (1536, 8960, 10, (4, 16, 16), 64),  # ten of the 30 blocks of Wan2.1 1.3B
    "1.4B, 64 tokens": (1536, 8960, 30, (1, 16, 16), 64),  # all 30 blocks
}
SMALL = (64, 128, 2, (1, 4, 4), 8)  # a first run, so that one-time imports and allocations are done
LORA = "fake_mode=lora"


def cases() -> dict[str, dict]:
    """name -> stage, ranks, network, words of the configuration."""
    out = {}

    def add(stage: int, net: str, ranks: int = 1, zero: int = 3, again: bool = False, more: str = "", heap=False):
        words = [f"batch={ranks}", f"checkpointing={str(again).lower()}"] if stage != 1 else ["batch=1", "memory=0.1"]
        words += ["guided=1", "estimator=full"] if stage == 2 else []  # whatever the tiny preset is tuned to
        words += [more] if more else []
        words += ["ema=0"] if stage in (0, 3) and "ema" not in more else []
        words += [f"engine=deepspeed zero={zero}"] * (ranks > 1)
        name = " ".join([net, f"stage {stage}", *([f"{ranks} ranks, zero {zero}"] if ranks > 1 else ["local"])])
        name += " recompute" * again + (f" {more}" if more else "") + " heap" * heap
        words = [w for word in words for w in word.split()]
        out[name] = {"stage": stage, "net": NETS[net], "ranks": ranks, "words": words, "heap": heap}

    large, small = "53M, 1024 tokens", "53M, 256 tokens"
    for again in (False, True):
        for stage in (0, 2, 3):
            add(stage, large, again=again)
    add(0, large, more="ema=0.99")
    add(0, large, heap=True)
    add(1, large)
    for zero in (1, 2, 3):
        add(0, small, 2, zero)
        add(2, small, 2, zero, again=True)
        add(3, small, 2, zero, again=True)
    add(1, small, 2)
    add(3, small, again=True, more=LORA)
    add(3, small, 2, again=True, more=LORA)
    add(0, "287M, 256 tokens")
    add(3, "287M, 256 tokens", 2, again=True)
    add(0, "499M, 256 tokens", again=True)
    add(0, "499M, 256 tokens", 2, 2, again=True)
    add(1, "1.4B, 64 tokens")
    add(1, "1.4B, 64 tokens", 2)
    return out


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def config_of(net: tuple) -> dict:
    dim, ffn, layers, _, _ = net
    keys = {"patch_size": [1, 2, 2], "num_attention_heads": dim // 64, "attention_head_dim": 64, "in_channels": 16}
    keys |= {"out_channels": 16, "text_dim": 256, "freq_dim": 256, "ffn_dim": ffn, "num_layers": layers}
    return keys | {"cross_attn_norm": True, "image_dim": None, "added_kv_proj_dim": None}


def stage_of(cfg, shape: tuple):
    """The stage with random weights and random clips; its networks are as stages/build.py makes them from folders."""
    config, (_, _, layers, latent, text) = config_of(shape), shape
    drop = dropped(layers, 0.3)
    keep = [i for i in range(layers) if i not in drop]

    def batches(step: int) -> Batch:
        gen, count = generator(0, step), len(rows(cfg.batch))
        x0, cond, null = (torch.randn(count, *n, generator=gen) for n in ((16, *latent), (text, 256), (text, 256)))
        return Batch(x0, Cond(cond), Cond(null))

    net = build(config, 0)
    if cfg.stage == "0":
        net.checkpointing = cfg.checkpointing
        return Teacher(cfg, net, batches, {})
    if cfg.stage == "2":
        net.checkpointing = cfg.checkpointing
        return Prune(cfg, net, drop, batches, lambda: batches(0), {})
    teacher = net.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True).prune(keep)
    lora = cfg.fake_mode == "lora"
    fake = teacher if lora else copy.deepcopy(teacher).requires_grad_(True).prune(keep)
    trained = attach_lora(teacher, cfg.lora_rank, generator(0, 7)) if lora else fake
    student.checkpointing = fake.checkpointing = cfg.checkpointing
    nets = Networks(student, teacher, keep, fake, keep if lora else None, trained, lora, None)
    return Distill(cfg, nets, batches, {})


def engine_of(cfg):
    if cfg.engine == "local":
        return LocalEngine(CPU, cfg.dtype, cfg.batch)
    from fastlightgen.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(CPU, cfg)


def run(case: dict, shape: tuple) -> dict[str, int]:
    """Resident bytes at some moments, and the peak of an iteration."""
    cfg = configuration(case)
    engine = engine_of(cfg)
    if case["stage"] == 1:
        net = build(config_of(shape), 0).requires_grad_(False)
        engine.place(net)
        x0, text = torch.randn(1, 16, *shape[3]), torch.randn(1, shape[4], 256)
        keeps = [[j for j in range(shape[2]) if j != i] for i in range(shape[2])] + [None]
        seen = {"placed": resident("VmRSS")}
        Path("/proc/self/clear_refs").write_text("5")
        # DeepSpeed records the first walk, and fetches ahead from the second walk on.
        samples = [(x0, torch.tensor([0.5]), x0, Cond(text))] * 2 * case["ranks"]
        table = torch.full((len(keeps), len(samples)), torch.nan)
        sweep = SimpleNamespace(table=table, tick=lambda scores: None, note=lambda: None)
        score_sets(net, samples, keeps, "elbo", cfg.memory, sweep)
        return seen | {"peak": resident("VmHWM")}
    stage = stage_of(cfg, shape)
    engine.prepare(stage)
    gc.collect()
    seen = {"placed": resident("VmRSS")}
    for update in stage.updates(0):  # AdamW creates its states
        engine.apply(update, 0)
    del update
    gc.collect()
    seen["stepped"] = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for update in stage.updates(5):  # a step in which every role is updated
        engine.apply(update, 5)
    return seen | {"peak": resident("VmHWM")}


def configuration(case: dict):
    return load([f"stage={case['stage']}", "run=unused", "progress=false", "dtype=float32", *case["words"]])


def worker(case: dict, out: str) -> None:
    """Run one process of a case; the first process writes the numbers of the largest one."""
    if case["ranks"] > 1:
        ranks.join(CPU, 600)
    torch.set_flush_denormal(True)
    run(case, SMALL)
    gc.collect()
    empty = resident("VmRSS")
    seen = {"empty": empty} | run(case, tuple(case["net"]))
    seen = {key: max(ranks.gathered(value)) for key, value in seen.items()}
    if ranks.rank() == 0:
        write_json(Path(out), seen)


def planned(case: dict) -> dict:
    """The planner's parts and peak for a case."""
    _, _, layers, latent, text = case["net"]
    plan = plan_of(configuration(case), case["ranks"], case["ranks"], "cpu")
    b = budget(network(config_of(case["net"]), latent, text, fused=False), plan, undropped(layers, 0.3))
    return {"parts": b.gpu, "peak": b.peak}


def measure(case: dict, name: str) -> dict:
    """Run the processes of a case; return what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seen.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case["ranks"])]
        command = [sys.executable, *(launch if case["ranks"] > 1 else []), __file__, f"worker={json.dumps(case)}"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        env |= {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
        env |= {} if case["heap"] else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        began = time.perf_counter()
        done = subprocess.run([*command, f"out={out}"], env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        return {"measured": read_json(out), "seconds": round(time.perf_counter() - began)}


def table(found: dict) -> str:
    lines = ["| case | measured peak, GB | planned, GB | planned / measured |", "|---|---|---|---|"]
    for name, record in found.items():
        measured, plan = record["measured"]["peak"], record["planned"]["peak"]
        lines.append(f"| {name} | {measured / 1e9:.2f} | {plan / 1e9:.2f} | {plan / measured:.3f} |")
    return "\n".join(lines)


def write(found: dict[str, dict], measured: bool) -> None:
    """The recorded measurements, beside the planner's present numbers; `measured`: one of them is new."""
    import deepspeed

    every = cases()
    found = {name: found[name] | {"planned": planned(every[name])} for name in every if name in found}
    for record in found.values():
        record["ratio"] = record["planned"]["peak"] / record["measured"]["peak"]
    made_with = versions(deepspeed=deepspeed.__version__) if measured else read_json(OUT)["measured with"]
    write_json(OUT, {"measured with": made_with, "cases": found})


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if "worker" in given:
        return worker(json.loads(given["worker"]), given["out"])
    found = read_json(OUT)["cases"] if OUT.is_file() and "again" not in given else {}
    for name, case in cases().items():
        if name not in found and all(word in name for word in given.get("cases", "").split("+")):
            found[name] = measure(case, name)
            write(found, measured=True)
            print(f"{name}: {read_json(OUT)['cases'][name]['ratio']:.3f} ({found[name]['seconds']} s)", flush=True)
    write(found, measured=False)
    print(table(read_json(OUT)["cases"]))


if __name__ == "__main__":
    main()
