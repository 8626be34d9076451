"""What makes a run that does not fit smaller, and what each change costs."""

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

from fastlightgen.config import Plan
from fastlightgen.models.cost import Network
from fastlightgen.planner.budget import Budget, budget

Change = tuple[dict, Budget]  # keys with their new values, and the plan with them


def candidates(net: Network, cfg: Plan) -> Iterator[dict]:
    """Changes that save memory, those that cost least first."""
    if cfg.engine == "deepspeed" and cfg.zero < 3:
        yield {"zero": 3}
    if cfg.keep_attention:
        yield {"keep_attention": 0}
    if cfg.stage == "1" and cfg.memory > 0.25:
        yield {"memory": 0.25}
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


def remedies(
    net: Network, cfg: Plan, room: float, drop: Sequence[int] | None = None, keys: Set[str] | None = None
) -> Iterator[Change]:
    """Each change on top of those before, until the peak is below `room`; those that save under 1% are passed over,
    and those of other keys than `keys` where these are given."""
    before = budget(net, cfg, drop)
    for change in candidates(net, cfg):
        if keys is not None and not keys >= change.keys():
            continue
        if before.peak < room:
            return
        cfg = replace(cfg, **{k: v for k, v in change.items() if getattr(cfg, k) != v})
        after = budget(net, cfg, drop)
        if after.peak < 0.99 * before.peak:
            yield change, after
            before = after


def words(change: dict) -> str:
    """A change as it is typed."""
    return " ".join(f"{k}={v}".lower() for k, v in change.items())


def price(before: Budget, after: Budget) -> str:
    """What a change costs per iteration."""
    parts = [f"operations x {after.flops / before.flops:.2f}"]
    wires = [sum(b.wire.values()) for b in (before, after)]
    parts += [f"wire {wires[0] / 1e9:.0f} -> {wires[1] / 1e9:.0f} GB"] if wires[1] != wires[0] else []
    hosts = [b.host_peak for b in (before, after)]
    parts += [f"host memory {hosts[0] / 1e9:.0f} -> {hosts[1] / 1e9:.0f} GB"] if hosts[1] != hosts[0] else []
    return ", ".join(parts)
