"""python -m fastlightgen.plan model=PRESET stage=N gpus=16 ...: memory, operations, traffic and time by arithmetic."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.config import GPUS, Plan, after_plan, another_stage, built_in, main, presets
from fastlightgen.config.plan import PLANNED
from fastlightgen.models.cost import Network
from fastlightgen.models.families import family_of
from fastlightgen.models.folder.networks import config_of
from fastlightgen.models.folder.released import sampling
from fastlightgen.planner.advice import faster, machines, recipe_for
from fastlightgen.planner.budget import PAPER, Budget, budget, load_network, paper_operations
from fastlightgen.planner.remedies import price, remedies, words
from fastlightgen.stages.check import require_embedded


def plan(cfg: Plan) -> None:
    """Print the plan, and write it to `out` as JSON if that is given. Exit with code 1 if the run does not fit."""
    if cfg.out and not Path(cfg.out).parent.is_dir():
        raise ValueError(f"out={cfg.out}: there is no folder {Path(cfg.out).parent}; make it, or choose another file")
    lines, record = table(cfg) if cfg.table else one(cfg)
    print("\n".join(lines))
    if cfg.out:
        write_json(Path(cfg.out), record)
    if not record.get("plan", {"fits": True})["fits"]:
        sys.exit(1)
    if not cfg.table:
        print(f"\nnext: {after_plan(cfg)}")


def room_of(cfg: Plan) -> float:
    """Return the memory of the GPU in bytes; infinity for a CPU, whose memory is unknown here."""
    return GPUS[cfg.gpu].memory if cfg.gpu in GPUS else math.inf


def one(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return the plan of one run, as lines and as a record."""
    config = config_of(cfg.model)
    cfg = replace(cfg, size=cfg.size or sampling(cfg.model).values["size"])
    if vars(cfg).get("teacher_guidance") == "embedded":
        require_embedded(family_of(config).settings(config).embeds_guidance)
    net = load_network(config, cfg.size, cfg.text_tokens, cfg.gpu in GPUS)
    b, room = budget(net, cfg), room_of(cfg)
    changes, before = list[tuple[str, Budget, str]](), b
    for change, after in remedies(net, cfg, room):
        changes.append((words(change), after, price(before, after)))
        before = after
    lines = [*title(net, cfg), "", *memory(cfg, b, room), "", *iteration(net, cfg, b), *advice(net, cfg, b, changes)]
    totals = {"peak": b.peak, "host_peak": b.host_peak, "fits": b.peak < room}
    record = asdict(cfg) | {"plan": asdict(b) | totals, "measured": False}
    record["changes"] = [{"change": what, "peak": after.peak, "cost": cost} for what, after, cost in changes]
    return lines, record


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
    """Return the two lines that name the network and the machine."""
    sharding = "one process" if cfg.engine == "local" else f"ZeRO-{cfg.zero}, offload {cfg.offload}"
    if cfg.sequence_parallel > 1:
        sharding += f", sequence parallel {cfg.sequence_parallel}"
    hosts = math.ceil(cfg.gpus / cfg.gpus_per_node)
    where = f" in {hosts} hosts of {cfg.gpus_per_node}" if hosts > 1 else ""
    clips = cfg.groups * cfg.micro * cfg.accumulation
    return [
        f"{cfg.model}, stage {cfg.stage}: {net.params:,} parameters, {len(net.blocks)} blocks, {cfg.size}",
        f"{cfg.gpus} x {cfg.gpu}{where}, {sharding}, {cfg.dtype}, {clips} clips per iteration",
    ]


def memory(cfg: Plan, b: Budget, room: float) -> list[str]:
    """Return the lines of the memory: of a GPU at the moment of its peak, and of a host."""
    verdict = "" if room == math.inf else "fits" if b.peak < room else "DOES NOT FIT"
    has = "" if room == math.inf else f"; {cfg.gpu} has {room / 1e9:.0f}"
    lines = [f"memory per {unit(cfg)} at its peak, {b.moment}, GB (planned, not measured{has})"]
    lines += [f"  {name:<28}{value / 1e9:10.2f}" for name, value in b.gpu.items()]
    lines += [f"  {'sum: the peak':<28}{b.peak / 1e9:10.2f}   {verdict}".rstrip()]
    if b.host:
        lines += ["memory per host, GB"] + [f"  {name:<36}{value / 1e9:10.2f}" for name, value in b.host.items()]
        lines += [f"  {'peak (files are read before written)':<36}{b.host_peak / 1e9:10.2f}"]
    return lines


def unit(cfg: Plan) -> str:
    return "process" if cfg.gpu == "cpu" else "GPU"


def iteration(net: Network, cfg: Plan, b: Budget) -> list[str]:
    """Return the lines of an iteration: operations, traffic and time."""
    again = f", of which {b.recomputed / b.flops:.0%} computed again" if b.recomputed else ""
    lines = [f"one iteration, per {unit(cfg)}"]
    lines += [f"  {'operations':<28}{b.flops / 1e15:10.3f} PFLOP{again}"]
    lines += [f"  {'block evaluations':<28}{b.calls:10.1f} per clip{grouped(net, cfg, b)}"]
    lines += [f"  {'block gathers':<28}{b.gathers:10.1f}"] if b.gathers else []
    lines += [f"  {name + ' on the wire':<28}{value / 1e9:10.2f} GB" for name, value in b.wire.items()]
    lines += [f"  {'between GPU and host':<28}{b.bus / 1e9:10.2f} GB"] if b.bus else []
    lines += [f"  {'time':<28}{b.seconds:10.2f} s", "", *formula(cfg, b)] if b.seconds else []
    return lines


def grouped(net: Network, cfg: Plan, b: Budget) -> str:
    """Say how many evaluations Stage I would take if `memory` held all candidates of a walk."""
    if "memory" not in vars(cfg):
        return ""
    larger: dict[str, Any] = {"memory": ENOUGH}
    fewest = budget(net, replace(cfg, **larger)).calls
    why = f"{fewest:.0f} if memory={vars(cfg)['memory']:g} held all candidates: each group walks its first blocks again"
    return f" ({why})" if fewest < b.calls else ""


def formula(cfg: Plan, b: Budget) -> list[str]:
    """Return the lines that derive the time from the operations."""
    peak = getattr(GPUS[cfg.gpu], cfg.dtype)
    source = "given" if cfg.efficiency else "the same for all stages and GPUs: what the paper's GPU-days imply"
    total = sum(paper_operations().values()) * PAPER.gpus / 1e18
    days = PAPER.stage2[0] + PAPER.stage3[0]
    implied = f"(Stages II and III: {days} GPU-days of an H100 for {total:.0f} planned EFLOP, if at {PAPER.size})"
    return [
        "time = operations / (efficiency x peak); days = time x iterations / 86400",
        f"  {b.flops / 1e15:.3f} PFLOP / ({b.efficiency:.4f} x {peak / 1e12:.0f} TFLOP/s) = {b.seconds:.2f} s",
        f"  {b.seconds:.2f} s x {b.iters} / 86400 = {b.days:.2f} days, {b.gpu_days:.2f} GPU-days",
        f"  efficiency: {source} {implied if not cfg.efficiency else ''}".rstrip(),
        "  it includes all waiting for data, host and wire",
    ]


def table(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return, for every preset, stage and kind of GPU, the planned peak and the changes that make it fit."""
    rows = [["model", "size", "stage", *TABLE]]
    record: dict = {"rows": [], "measured": False}
    for name in (name for name in presets() if not built_in(name)):
        size = cfg.size or sampling(name).values["size"]
        net = load_network(config_of(name), size, cfg.text_tokens)
        for stage in PLANNED:
            cells = {gpu: cell(net, another_stage(cfg, stage, model=name, gpu=gpu)) for gpu in TABLE}
            rows.append([name, size, stage, *(cells[gpu]["text"] for gpu in TABLE)])
            record["rows"].append({"model": name, "size": size, "stage": stage, "gpus": cells})
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    about = f"planned, not measured: {cfg.gpus} GPUs, every stage with its own batch; per GPU the sum in GB"
    lines = ["  ".join(text.ljust(n) for text, n in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"{about}, with the changes that make it fit", *lines], record


ENOUGH = 1e6  # GiB
TABLE = ("4090", "l40s", "h100", "h200")  # one kind for each size of memory
SHORT = {"sequence_parallel": "sp", "checkpointing": "ckpt", "fake_mode": "fake", "micro_batch": "micro"}


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
