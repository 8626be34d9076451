"""python -m fastlightgen.plan model=PRESET stage=N gpus=16 ...: memory, operations, traffic and time by arithmetic."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from fastlightgen.config import GPUS, Plan, main, preset, presets
from fastlightgen.models.cost import Network
from fastlightgen.stages.budget import GPU, Budget, budget, load_network

STANDARD = {"wan": "480x832x81", "hunyuan": "720x1280x129"}  # the sizes of the table


def plan(cfg: Plan) -> None:
    lines, record = table(cfg) if cfg.table else one(cfg)
    print("\n".join(lines))
    if cfg.out:
        temporary = Path(cfg.out).with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(cfg.out)


def config_of(model: str) -> dict:
    """The diffusers configuration of a preset or a model folder."""
    if model in presets():
        return preset(model)["network"]
    path = Path(model) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as err:
        raise ValueError(f"{path}: cannot be read as JSON ({err}); give a preset or a model folder") from None


def one(cfg: Plan) -> tuple[list[str], dict]:
    """The plan of one run, as lines and as a record."""
    net = load_network(config_of(cfg.model), cfg.size, cfg.text_tokens)
    b = budget(net, cfg)
    room = GPU[cfg.gpu].memory
    fits = b.peak < room
    lines = [*title(net, cfg), ""]
    lines += [f"memory per GPU, GB (planned, not measured; {cfg.gpu} has {room / 1e9:.0f})"]
    lines += [f"  {name:<28}{value / 1e9:10.2f}" for name, value in b.gpu.items()]
    lines += [f"  {'sum: bounds the peak':<28}{b.peak / 1e9:10.2f}   {'fits' if fits else 'DOES NOT FIT'}"]
    if b.host:
        lines += ["memory per host, GB"] + [f"  {name:<28}{value / 1e9:10.2f}" for name, value in b.host.items()]
        lines += [f"  {'sum':<28}{sum(b.host.values()) / 1e9:10.2f}"]
    lines += ["", "one iteration, per GPU"]
    again = f", of which {b.recomputed / b.flops:.0%} computed again" if b.recomputed else ""
    lines += [f"  {'operations':<28}{b.flops / 1e15:10.3f} PFLOP{again}"]
    lines += [f"  {'block evaluations':<28}{b.calls:10.1f} per clip"]
    lines += [f"  {'block gathers':<28}{b.gathers:10.1f}"] if b.gathers else []
    lines += [f"  {name + ' on the wire':<28}{value / 1e9:10.2f} GB" for name, value in b.wire.items()]
    lines += [f"  {'between GPU and host':<28}{b.bus / 1e9:10.2f} GB"] if b.bus else []
    lines += [f"  {'time':<28}{b.seconds:10.2f} s", "", *formula(cfg, b)]
    changes = [] if fits else list(remedies(net, cfg))
    if not fits:
        lines += ["", "to make it fit, cheapest first, each on top of those before:"]
        lines += [f"  {what:<44}{after.peak / 1e9:8.1f} GB   {cost}" for what, after, cost in changes]
        if changes and changes[-1][1].peak >= room or not changes:
            lines += [f"  still more than {room / 1e9:.0f} GB: more GPUs, a larger GPU, or a smaller size"]
    record = asdict(cfg) | {"plan": asdict(b) | {"peak": b.peak, "fits": fits}, "measured": False}
    record["changes"] = [{"change": what, "peak": after.peak, "cost": cost} for what, after, cost in changes]
    return lines, record


def title(net: Network, cfg: Plan) -> list[str]:
    sharding = "one process" if cfg.engine == "local" else f"ZeRO-{cfg.zero}, offload {cfg.offload}"
    if cfg.sequence_parallel > 1:
        sharding += f", sequence parallel {cfg.sequence_parallel}"
    clips = cfg.gpus // cfg.sequence_parallel * cfg.batch * cfg.accumulation
    return [
        f"{cfg.model}, stage {cfg.stage}: {net.params:,} parameters, {len(net.blocks)} blocks, {cfg.size}",
        f"{cfg.gpus} x {cfg.gpu}, {cfg.gpus_per_node} per host, {sharding}, {clips} clips per iteration",
    ]


def formula(cfg: Plan, b: Budget) -> list[str]:
    peak = getattr(GPU[cfg.gpu], cfg.dtype)
    source = "given" if cfg.efficiency else "implied by the paper's 86.4 s per iteration, if at 480x832x81 on H100"
    return [
        "time = operations / (efficiency x peak); GPU-days = time x iterations x GPUs / 86400",
        f"  {b.flops / 1e15:.3f} PFLOP / ({b.efficiency:.4f} x {peak / 1e12:.0f} TFLOP/s) = {b.seconds:.2f} s",
        f"  {b.seconds:.2f} s x {b.iters} x {cfg.gpus} / 86400 = {b.gpu_days:.2f} GPU-days",
        f"  efficiency: {source}; it includes all waiting for data, host and wire",
    ]


def candidates(net: Network, cfg: Plan) -> Iterator[dict]:
    """Changes that save memory, those that cost least first."""
    if cfg.engine == "deepspeed" and cfg.zero < 3:
        yield {"zero": 3}
    if cfg.keep_attention:
        yield {"keep_attention": 0}
    if not cfg.checkpointing:
        yield {"checkpointing": True}
    if cfg.batch > 1:
        yield {"batch": 1, "accumulation": cfg.accumulation * cfg.batch}
    if cfg.engine == "deepspeed":
        if cfg.offload == "none":
            yield {"offload": "optimizer", "zero": 3}
        for n in (2, 4, 8):
            if n > cfg.sequence_parallel and net.heads % n == 0 and cfg.gpus % n == 0:
                yield {"sequence_parallel": n}
    if cfg.stage == "3" and cfg.fake_mode == "copy":
        yield {"fake_mode": "lora"}
    if cfg.engine == "deepspeed" and cfg.offload != "all":
        yield {"offload": "all", "zero": 3}


def remedies(net: Network, cfg: Plan) -> Iterator[tuple[str, Budget, str]]:
    """(change, plan with it, its cost) until the run fits; changes that save less than 1% are passed over."""
    before = budget(net, cfg)
    for change in candidates(net, cfg):
        if before.peak < GPU[cfg.gpu].memory:
            return
        cfg = replace(cfg, **{k: v for k, v in change.items() if getattr(cfg, k) != v})
        after = budget(net, cfg)
        if after.peak < 0.99 * before.peak:
            yield " ".join(f"{k}={v}".lower() for k, v in change.items()), after, price(before, after)
            before = after


def price(before: Budget, after: Budget) -> str:
    """What a change costs per iteration."""
    parts = [f"operations x {after.flops / before.flops:.2f}"]
    wires = [sum(b.wire.values()) for b in (before, after)]
    parts += [f"wire {wires[0] / 1e9:.0f} -> {wires[1] / 1e9:.0f} GB"] if wires[1] != wires[0] else []
    hosts = [sum(b.host.values()) for b in (before, after)]
    parts += [f"host memory {hosts[0] / 1e9:.0f} -> {hosts[1] / 1e9:.0f} GB"] if hosts[1] != hosts[0] else []
    return ", ".join(parts)


def table(cfg: Plan) -> tuple[list[str], dict]:
    """For every preset and stage the planned peak, and per kind of GPU what makes it fit."""
    lines = [
        f"planned, not measured: {cfg.gpus} GPUs, batch {cfg.batch}, {'' if cfg.checkpointing else 'no '}checkpointing;"
        " per GPU the sum in GB, with the changes that make it fit",
        f"{'model':<28}{'size':<15}{'stage':<7}" + "".join(f"{gpu:<30}" for gpu in GPUS).rstrip(),
    ]
    record: dict = {"rows": [], "measured": False}
    for name in (name for name in presets() if not name.startswith("tiny")):
        config = config_of(name)
        family = "hunyuan" if "Hunyuan" in config.get("_class_name", "") else "wan"
        net = load_network(config, STANDARD[family], cfg.text_tokens)
        for stage in ("0", "1", "2", "3"):
            cells = {gpu: cell(net, replace(cfg, model=name, stage=stage, gpu=gpu)) for gpu in GPUS}
            row = "".join(f"{cells[gpu]['text']:<30}" for gpu in GPUS)
            lines.append(f"{name:<28}{STANDARD[family]:<15}{stage:<7}{row}".rstrip())
            record["rows"].append({"model": name, "size": STANDARD[family], "stage": stage, "gpus": cells})
    return lines, record


SHORT = {"sequence_parallel": "sp", "checkpointing": "ckpt", "fake_mode": "fake", "accumulation": "acc"}


def cell(net: Network, cfg: Plan) -> dict:
    """What one kind of GPU needs for one stage."""
    peak, changes = budget(net, cfg).peak, {}
    for what, after, _ in remedies(net, cfg):
        changes |= dict(word.split("=") for word in what.split())
        peak = after.peak
    if cfg.zero == 3:
        changes.pop("zero", None)
    fits = peak < GPU[cfg.gpu].memory
    done = "".join(f" {SHORT.get(key, key)}={value}" for key, value in changes.items())
    return {"peak": peak, "fits": fits, "changes": changes, "text": f"{peak / 1e9:.0f}{done}" if fits else "no"}


if __name__ == "__main__":
    main(plan, "plan")
