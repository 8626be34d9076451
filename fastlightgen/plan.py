"""python -m fastlightgen.plan model=PRESET stage=N gpus=16 ...: memory, operations, traffic and time by arithmetic."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastlightgen.atomic import write_json
from fastlightgen.config import GPUS, Plan, after_plan, another_stage, main, preset, presets
from fastlightgen.config.plan import PLANNED
from fastlightgen.models.cost import Network
from fastlightgen.models.families import family_of
from fastlightgen.planner.budget import GPU, Budget, budget, load_network
from fastlightgen.planner.remedies import price, remedies, words
from fastlightgen.stages.check import require_embedded


def plan(cfg: Plan) -> None:
    """Print the plan, and write it to `out` as JSON if that is given."""
    if cfg.out and not Path(cfg.out).parent.is_dir():
        raise ValueError(f"out={cfg.out}: there is no folder {Path(cfg.out).parent}; make it, or choose another file")
    lines, record = table(cfg) if cfg.table else one(cfg)
    print("\n".join(lines))
    if cfg.out:
        write_json(Path(cfg.out), record)
    if not cfg.table and record["plan"]["fits"]:
        print(f"\nnext: {after_plan(cfg)}")


def config_of(model: str) -> dict:
    """Return the diffusers configuration of a preset or a model folder."""
    if model in presets():
        return preset(model)["network"]
    path = Path(model) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise ValueError(f"{path}: cannot be read as JSON ({err}); give a preset or a model folder") from None


def room_of(cfg: Plan) -> float:
    """Return the memory of the GPU in bytes; infinity for a CPU, whose memory is unknown here."""
    return GPU[cfg.gpu].memory if cfg.gpu in GPU else math.inf


def one(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return the plan of one run, as lines and as a record."""
    config = config_of(cfg.model)
    if vars(cfg).get("teacher_guidance") == "embedded":
        require_embedded(family_of(config).settings(config).embeds_guidance)
    net = load_network(config, cfg.size, cfg.text_tokens, cfg.gpu in GPU)
    b, room = budget(net, cfg), room_of(cfg)
    fits = b.peak < room
    verdict = "" if room == math.inf else "fits" if fits else "DOES NOT FIT"
    has = "" if room == math.inf else f"; {cfg.gpu} has {room / 1e9:.0f}"
    lines = [*title(net, cfg), ""]
    lines += [f"memory per {'process' if cfg.gpu == 'cpu' else 'GPU'}, GB (planned, not measured{has})"]
    lines += [f"  {name:<28}{value / 1e9:10.2f}" for name, value in b.gpu.items()]
    lines += [f"  {'sum: the peak':<28}{b.peak / 1e9:10.2f}   {verdict}".rstrip()]
    if b.host:
        lines += ["memory per host, GB"] + [f"  {name:<36}{value / 1e9:10.2f}" for name, value in b.host.items()]
        lines += [f"  {'peak (files are read before written)':<36}{b.host_peak / 1e9:10.2f}"]
    lines += ["", f"one iteration, per {'process' if cfg.gpu == 'cpu' else 'GPU'}"]
    again = f", of which {b.recomputed / b.flops:.0%} computed again" if b.recomputed else ""
    lines += [f"  {'operations':<28}{b.flops / 1e15:10.3f} PFLOP{again}"]
    lines += [f"  {'block evaluations':<28}{b.calls:10.1f} per clip"]
    lines += [f"  {'block gathers':<28}{b.gathers:10.1f}"] if b.gathers else []
    lines += [f"  {name + ' on the wire':<28}{value / 1e9:10.2f} GB" for name, value in b.wire.items()]
    lines += [f"  {'between GPU and host':<28}{b.bus / 1e9:10.2f} GB"] if b.bus else []
    lines += [f"  {'time':<28}{b.seconds:10.2f} s", "", *formula(cfg, b)] if b.seconds else []
    changes, before = [], b
    for change, after in remedies(net, cfg, room):
        changes.append((words(change), after, price(before, after)))
        before = after
    if not fits:
        lines += ["", "to make it fit, cheapest first, each on top of those before:"]
        lines += [f"  {what:<44}{after.peak / 1e9:8.1f} GB   {cost}" for what, after, cost in changes]
        if before.peak >= room:
            lines += [f"  still more than {room / 1e9:.0f} GB: more GPUs, a larger GPU, or a smaller size"]
    record = asdict(cfg) | {"plan": asdict(b) | {"peak": b.peak, "host_peak": b.host_peak, "fits": fits}}
    record |= {"measured": False}
    record["changes"] = [{"change": what, "peak": after.peak, "cost": cost} for what, after, cost in changes]
    return lines, record


def title(net: Network, cfg: Plan) -> list[str]:
    """Return the two lines that name the network and the machine."""
    sharding = "one process" if cfg.engine == "local" else f"ZeRO-{cfg.zero}, offload {cfg.offload}"
    if cfg.sequence_parallel > 1:
        sharding += f", sequence parallel {cfg.sequence_parallel}"
    clips = cfg.groups * cfg.micro * cfg.accumulation
    return [
        f"{cfg.model}, stage {cfg.stage}: {net.params:,} parameters, {len(net.blocks)} blocks, {cfg.size}",
        f"{cfg.gpus} x {cfg.gpu}, {cfg.gpus_per_node} per host, {sharding}, {clips} clips per iteration",
    ]


def formula(cfg: Plan, b: Budget) -> list[str]:
    """Return the lines that derive the time from the operations."""
    peak = getattr(GPU[cfg.gpu], cfg.dtype)
    source = "given" if cfg.efficiency else "implied by the paper's 86.4 s per iteration, if at 480x832x81 on H100"
    return [
        "time = operations / (efficiency x peak); GPU-days = time x iterations x GPUs / 86400",
        f"  {b.flops / 1e15:.3f} PFLOP / ({b.efficiency:.4f} x {peak / 1e12:.0f} TFLOP/s) = {b.seconds:.2f} s",
        f"  {b.seconds:.2f} s x {b.iters} x {cfg.gpus} / 86400 = {b.gpu_days:.2f} GPU-days",
        f"  efficiency: {source}; it includes all waiting for data, host and wire",
    ]


def table(cfg: Plan) -> tuple[list[str], dict[str, Any]]:
    """Return, for every preset, stage and kind of GPU, the planned peak and the changes that make it fit."""
    lines = [
        f"planned, not measured: {cfg.gpus} GPUs, every stage with its own batch; per GPU the sum in GB, with the "
        "changes that make it fit",
        f"{'model':<32}{'size':<15}{'stage':<7}" + "".join(f"{gpu:<30}" for gpu in GPUS).rstrip(),
    ]
    record: dict = {"rows": [], "measured": False}
    for name in (name for name in presets() if not name.startswith("tiny")):
        config = config_of(name)
        size = family_of(config).clips.size
        net = load_network(config, size, cfg.text_tokens)
        for stage in PLANNED:
            cells = {gpu: cell(net, another_stage(cfg, stage, model=name, gpu=gpu)) for gpu in GPUS}
            row = "".join(f"{cells[gpu]['text']:<30}" for gpu in GPUS)
            lines.append(f"{name:<32}{size:<15}{stage:<7}{row}".rstrip())
            record["rows"].append({"model": name, "size": size, "stage": stage, "gpus": cells})
    return lines, record


SHORT = {"sequence_parallel": "sp", "checkpointing": "ckpt", "fake_mode": "fake", "micro_batch": "micro"}


def cell(net: Network, cfg: Plan) -> dict:
    """Return the peak in bytes of one stage on one kind of GPU, after the changes that make it fit."""
    peak, room = budget(net, cfg).peak, room_of(cfg)
    changes: dict[str, str] = {}
    for change, after in remedies(net, cfg, room):
        changes |= {k: str(v).lower() for k, v in change.items()}
        peak = after.peak
    if cfg.zero == 3:
        changes.pop("zero", None)
    fits = peak < room
    done = "".join(f" {SHORT.get(key, key)}={value}" for key, value in changes.items())
    return {"peak": peak, "fits": fits, "changes": changes, "text": f"{peak / 1e9:.0f}{done}" if fits else "no"}


if __name__ == "__main__":
    main(plan, "plan")
