"""python -m fastlightgen.plan model=PRESET stage=N gpus=16 ...: memory, operations, traffic and time by arithmetic."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.config import (
    GPUS,
    IN_TURN,
    Plan,
    after_plan,
    another_stage,
    built_in,
    main,
    plan_of_stage,
    presets,
)
from fastlightgen.config.plan import PLANNED
from fastlightgen.models.cost import Network
from fastlightgen.models.families import family_of, network
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.released import sampling
from fastlightgen.parallel.log import size
from fastlightgen.planner.advice import faster, machines, recipe_for
from fastlightgen.planner.budget import PAPER, Budget, budget, load_network, paper_operations
from fastlightgen.planner.remedies import price, remedies, words
from fastlightgen.stages.check import require_embedded
from fastlightgen.stages.experts import runs_of
from fastlightgen.stages.recovery import recovery_plan
from fastlightgen.stages.start import require_fitting
from fastlightgen.world.source import ShapesSource

UNKNOWN = {  # words of the next command that stand for what the plan does not know
    "MODEL": "the teacher's folder",
    "CACHE": "the folder that `encode` wrote",
    "HOST": "the name of the first host; start the command on every host",
}


def plan(cfg: Plan) -> None:
    """Print the plan, and write it to `out` as JSON if that is given. Exit with code 1 if the run does not fit."""
    if cfg.out and not Path(cfg.out).parent.is_dir():
        raise ValueError(f"out={cfg.out}: there is no folder {Path(cfg.out).parent}; make it, or choose another file")
    lines, record = table(cfg) if cfg.table else every(cfg) if cfg.stage == "all" else one(cfg)
    print("\n".join(lines))
    if cfg.out:
        write_json(Path(cfg.out), record)
    if not all(part["plan"]["fits"] for part in parts_of(record.get("stages", [record]))):
        sys.exit(1)
    if not cfg.table:
        line = after_plan(cfg)
        words = line.replace("=", " ").replace(":", " ").split()
        unknown = [f"{word}: {what}" for word, what in UNKNOWN.items() if word in words]
        print("", *([f"in the next command, {'; '.join(unknown)}"] * bool(unknown)), f"next: {line}", sep="\n")


def parts_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plans of all runs in some records: that of a Stage I may hold another one, of the recoveries after it."""
    parts = [part for record in records for part in (record, record.get("recovery", {}))]
    return [part for part in parts if "plan" in part]


def room_of(cfg: Plan) -> float:
    """Return the memory of the GPU in bytes; infinity for a CPU, whose memory is unknown here."""
    return GPUS[cfg.gpu].memory if cfg.gpu in GPUS else math.inf


def one(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return the plan of one run, as lines and as a record; of two experts that of the low-noise one, the larger."""
    cfg = runs_of(cfg)[-1]
    config = config_of(cfg.model)
    net, cfg = network_of(cfg, config)
    if vars(cfg).get("teacher_guidance") == "embedded":
        require_embedded(family_of(config).settings(config).embeds_guidance)
    b, room = budget(net, cfg), room_of(cfg)
    changes, before = list[tuple[str, Budget, str]](), b
    for change, after in remedies(net, cfg, room):
        changes.append((words(change), after, price(before, after)))
        before = after
    lines = [*title(net, cfg), "", *memory(cfg, b, room), "", *iteration(net, cfg, b), *advice(net, cfg, b, changes)]
    totals = {"peak": b.peak, "host_peak": b.host_peak, "fits": b.peak < room}
    record = asdict(cfg) | {"plan": asdict(b) | totals, "measured": False}
    record["changes"] = [{"change": what, "peak": after.peak, "cost": cost} for what, after, cost in changes]
    if vars(cfg).get("search") == "calibrated":  # Stage I trains after its sweep
        more, record["recovery"] = one(recovery_plan(cfg))
        what = f"then search=calibrated trains {vars(cfg)['candidates']} sets of blocks, here as one run of Stage II:"
        lines += ["", what, *more]
    return lines, record


def network_of(cfg: Plan, config: dict[str, Any]) -> tuple[Network, Plan]:
    """The network at the size of its clips, and the plan with that size: of the built-in world, or the model's own."""
    fused = cfg.gpu in GPUS
    if built_in(cfg.model) and not cfg.size:
        world = ShapesSource(0)
        (frames, height, width), text = world.largest().x0.shape[2:], world.largest().cond.text
        size = f"{world.train.size}x{world.train.size}x{world.train.frames}"
        net = network(config, (frames, height, width), text.shape[1], fused)
        return net, replace(cfg, size=size, previews=False)
    cfg = replace(cfg, size=cfg.size or sampling(cfg.model).values["size"])
    return load_network(config, cfg.size, cfg.text_tokens, fused), cfg


def every(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return the plans of stages 1, 2 and 3 one after the other, and what they take together."""
    stages = [plan_of_stage(cfg, stage) for stage in IN_TURN]
    require_fitting(*stages[1:])
    plans = [one(stage) for stage in stages]
    records = [record for _, record in plans]
    gpu_days = sum(record["plan"]["gpu_days"] for record in parts_of(records))
    stage, peak = max(((r["stage"], r["plan"]["peak"]) for r in parts_of(records)), key=itemgetter(1))
    time = f"{gpu_days / cfg.gpus:.2f} days, {gpu_days:.1f} GPU-days; " if gpu_days else ""
    total = f"stages 1, 2 and 3 together: {time}the largest peak is {size(peak)} per {unit(cfg)}, in stage {stage}"
    return [*(line for lines, _ in plans for line in (*lines, "")), total], {"stages": records, "measured": False}


def advice(net: Network, cfg: Plan, b: Budget, changes: Sequence[tuple[str, Budget, str]]) -> list[str]:
    """Return the lines about a run that does not fit or takes weeks; `changes` as (keys, plan with them, price)."""
    room = room_of(cfg)
    if b.peak < room:
        ways = [f"  {way}" for way in faster(net, cfg, b, cfg.model)]
        return ["", f"{b.days:.0f} days are long. Shorter:", *ways] if ways else []
    lines = [""] + ["to make it fit, cheapest first, each on top of those before:"] * bool(changes)
    lines += [f"  {what:<44}{after.peak / 1e9:8.1f} GB   {cost}" for what, after, cost in changes]
    if (changes[-1][1] if changes else b).peak >= room:
        found = [f"  {machine}" for machine in machines(net, cfg)]
        lines += [f"  no key makes it fit into {room / 1e9:.0f} GB; {'it fits with' if found else 'use smaller clips'}"]
        lines += found
    recipe = recipe_for(cfg.model, cfg)
    return [*lines, *([f"recipe: {recipe}"] if recipe else [])]


def title(net: Network, cfg: Plan) -> list[str]:
    """Return the lines that name the network and the machine."""
    sharding = "one process" if cfg.engine == "local" else f"ZeRO-{cfg.zero}, offload {cfg.offload}"
    if cfg.sequence_parallel > 1:
        sharding += f", sequence parallel {cfg.sequence_parallel}"
    hosts = math.ceil(cfg.gpus / cfg.gpus_per_node)
    where = f" in {hosts} hosts of {cfg.gpus_per_node}" if hosts > 1 else ""
    clips = cfg.groups * cfg.micro * cfg.accumulation
    expert = [f"expert={cfg.expert} alone; the other one's turn takes as long"] if cfg.boundary else []
    return [
        f"{cfg.model}, stage {cfg.stage}: {net.params:,} parameters, {len(net.blocks)} blocks, {cfg.size}",
        f"{cfg.gpus} x {cfg.gpu}{where}, {sharding}, {cfg.dtype}, {clips} clips per iteration",
        *expert,
    ]


def memory(cfg: Plan, b: Budget, room: float) -> list[str]:
    """Return the lines of the memory: of a GPU at the moment of its peak, and of a host."""
    verdict = "" if room == math.inf else "fits" if b.peak < room else "DOES NOT FIT"
    name, one = ("GB", 1e9) if b.peak >= 1e9 else ("MB", 1e6)
    has = "" if room == math.inf else f"; {cfg.gpu} has {room / 1e9:.0f}{' GB' * (name != 'GB')}"
    lines = [f"memory per {unit(cfg)} at its peak, {b.moment}, {name} (planned, not measured{has})"]
    lines += [f"  {part:<28}{value / one:10.2f}" for part, value in b.gpu.items()]
    lines += [f"  {'sum: the peak':<28}{b.peak / one:10.2f}   {verdict}".rstrip()]
    if b.host:
        lines += [f"memory per host, {name}"] + [f"  {part:<36}{value / one:10.2f}" for part, value in b.host.items()]
        lines += [f"  {'peak (files are read before written)':<36}{b.host_peak / one:10.2f}"]
    return lines


def unit(cfg: Plan) -> str:
    return "process" if cfg.gpu == "cpu" else "GPU"


def iteration(net: Network, cfg: Plan, b: Budget) -> list[str]:
    """Return the lines of an iteration: operations, traffic and time."""
    again = f", of which {b.recomputed / b.flops:.0%} computed again" if b.recomputed else ""
    lines = [f"one iteration, per {unit(cfg)}"]
    lines += [f"  {'operations':<28}{operations(b):>16}{again}"]
    lines += [f"  {'block evaluations':<28}{b.calls:10.1f} per clip{grouped(net, cfg, b)}"]
    lines += [f"  {'block gathers':<28}{b.gathers:10.1f}"] if b.gathers else []
    lines += [f"  {name + ' on the wire':<28}{value / 1e9:10.2f} GB" for name, value in b.wire.items()]
    lines += [f"  {'between GPU and host':<28}{b.bus / 1e9:10.2f} GB"] if b.bus else []
    lines += [f"  {'time':<28}{b.seconds:10.2f} s", "", *formula(cfg, b)] if b.seconds else []
    return lines


def operations(b: Budget) -> str:
    """The operations of an iteration."""
    name, one = ("PFLOP", 1e15) if b.flops >= 1e14 else ("GFLOP", 1e9)
    return f"{b.flops / one:.3f} {name}"


def grouped(net: Network, cfg: Plan, b: Budget) -> str:
    """Say how many evaluations Stage I would take if `memory` held all candidates of a walk."""
    if "memory" not in vars(cfg):
        return ""
    larger: dict[str, Any] = {"memory": ENOUGH}
    fewest = budget(net, replace(cfg, **larger)).calls
    why = f"{fewest:.0f} if memory={vars(cfg)['memory']:g} held all candidates: each group walks its first blocks again"
    return f" ({why})" if fewest < b.calls else ""


REACHED = "an H100 alone, with clips at hand, reached 48% in a step of Wan 1.3B (docs/speed.md): try efficiency=0.45"


def formula(cfg: Plan, b: Budget) -> list[str]:
    """Return the lines that derive the time from the operations."""
    peak = getattr(GPUS[cfg.gpu], cfg.dtype)
    source = "given" if cfg.efficiency else "the same for all stages and GPUs: what the paper's GPU-days imply"
    total = sum(paper_operations().values()) * PAPER.gpus / 1e18
    days = PAPER.stage2[0] + PAPER.stage3[0]
    implied = f"(Stages II and III: {days} GPU-days of an H100 for {total:.0f} planned EFLOP, if at {PAPER.size})"
    return [
        "time = operations / (efficiency x peak); days = time x iterations / 86400",
        f"  {operations(b)} / ({b.efficiency:.4f} x {peak / 1e12:.0f} TFLOP/s) = {b.seconds:.2f} s",
        f"  {b.seconds:.2f} s x {b.iters} / 86400 = {b.days:.2f} days, {b.gpu_days:.2f} GPU-days",
        f"  efficiency: {source} {implied if not cfg.efficiency else ''}".rstrip(),
        "  it includes all waiting for data, host and wire",
        *([f"  {REACHED}"] if cfg.gpu == "h100" and not cfg.efficiency else []),
        *(["  fp8=frozen: no gain is counted, because none was measured"] if cfg.fp8 != "off" else []),
    ]


def table(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return, for every preset, stage and kind of GPU, the planned peak and the changes that make it fit."""
    rows = [["model", "size", "stage", *TABLE]]
    record: dict = {"rows": [], "measured": False}
    for name in (name for name in presets() if not built_in(name)):
        size = cfg.size or sampling(name).values["size"]
        net = load_network(config_of(name), size, cfg.text_tokens)
        for stage in PLANNED:
            cells = {gpu: cell(net, runs_of(another_stage(cfg, stage, model=name, gpu=gpu))[-1]) for gpu in TABLE}
            rows.append([name, size, stage, *(cells[gpu]["text"] for gpu in TABLE)])
            record["rows"].append({"model": name, "size": size, "stage": stage, "gpus": cells})
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    about = f"planned, not measured: {cfg.gpus} GPUs, every stage with its own batch; per GPU the sum in GB"
    lines = ["  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    short = ", ".join(f"{word} {key}" for key, word in SHORT.items())
    return [f"{about}, with the changes that make it fit ({short})", *lines], record


ENOUGH = 1e6  # GB
TABLE = ("4090", "l40s", "h100", "h200")  # one kind for each size of memory
SHORT = {"sequence_parallel": "sp", "checkpointing": "ckpt", "fake_mode": "critic", "micro_batch": "micro"}


def cell(net: Network, cfg: Plan) -> dict:
    """Return the peak in bytes of one stage on one kind of GPU, after the changes that make it fit."""
    peak, room = budget(net, cfg).peak, room_of(cfg)
    changes: dict[str, str] = {}
    for change, after in remedies(net, cfg, room):
        changes |= {k: str(v).lower() for k, v in change.items()}
        peak = after.peak
    fits = peak < room
    done = "".join(f" {SHORT.get(key, key)}={value}" for key, value in changes.items())
    return {"peak": peak, "fits": fits, "changes": changes, "text": f"{peak / 1e9:.0f}{done}" if fits else "no"}


if __name__ == "__main__":
    main(plan, "plan")
