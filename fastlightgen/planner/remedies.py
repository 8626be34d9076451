"""Changes that make a run fit into memory, and the price of each."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, replace
from typing import Any

from fastlightgen.config import Plan, method_for
from fastlightgen.models.cost import Network
from fastlightgen.planner.budget import Budget, budget

Change = tuple[Mapping[str, Any], Budget]  # keys with their new values, and the plan with them


def candidates(net: Network, plan: Plan) -> Iterator[Mapping[str, Any]]:
    """Changes that save memory, the cheapest first."""
    keys, sharded = vars(plan), plan.engine == "deepspeed"
    computes = {f.name for f in fields(plan) if f.metadata["numbers"]}  # keys that change what is computed
    own = [s for s in method_for(plan).savings if any(keys[key] != value for key, value in s.items())]
    if sharded and plan.zero < 3:
        yield {"zero": 3}
    if plan.fp8 != "off":
        yield {"fp8": "off"}
    if keys.get("keep_attention"):
        yield {"keep_attention": 0}
    yield from (saving for saving in own if not saving.keys() & computes)
    if not keys.get("checkpointing", True):
        yield {"checkpointing": True}
    if plan.stage != "1" and plan.micro > 1:
        yield {"micro_batch": 1}
    if plan.stage == "1" and keys["batch"] > 1:
        yield {"batch": 1}
    if sharded and plan.offload == "none":
        yield {"offload": "optimizer", "zero": 3}
    alone = not sharded and plan.gpu != "cpu"  # one GPU can move to DeepSpeed, which has a place for AdamW's states
    if alone:
        yield {"engine": "deepspeed", "offload": "optimizer"}
    for n in (2, 4, 8):
        if sharded and n > plan.sequence_parallel and net.heads % n == 0 and plan.gpus % n == 0:
            yield {"sequence_parallel": n} | ({"micro_batch": 1} if plan.stage != "1" else {})
    yield from (saving for saving in own if saving.keys() & computes)
    if (sharded or alone) and plan.offload != "all":
        yield {"engine": "deepspeed", "offload": "all", "zero": 3}
    if keys.get("student_mode") == "copy" and keys.get("target") != "ema":  # the last, because fewer numbers train
        yield {"student_mode": "lora"}


def remedies(
    net: Network, plan: Plan, room: float, keep: Sequence[int] | None = None, keys: Set[str] | None = None
) -> Iterator[Change]:
    """Each change on top of those before, until the peak is below `room`.

    Changes that save under 1% are passed over, and those of other keys than `keys` where these are given.
    """
    before = budget(net, plan, keep)
    for wanted in candidates(net, plan):
        change = {k: v for k, v in wanted.items() if getattr(plan, k) != v}
        if keys is not None and not keys >= change.keys():
            continue
        if before.peak < room:
            return
        changed = replace(plan, **change)
        after = budget(net, changed, keep)
        if after.peak < 0.99 * before.peak:
            yield change, after
            plan, before = changed, after


def words(change: Mapping[str, Any]) -> str:
    """A change as a user types it."""
    return " ".join(f"{k}={v}".lower() for k, v in change.items())


def price(before: Budget, after: Budget) -> str:
    """What a change costs per iteration."""
    parts = [f"operations x {after.flops / before.flops:.2f}"]
    wires = [sum(b.wire.values()) for b in (before, after)]
    parts += [f"wire {wires[0] / 1e9:.0f} -> {wires[1] / 1e9:.0f} GB"] if wires[1] != wires[0] else []
    hosts = [b.host_peak for b in (before, after)]
    parts += [f"host memory {hosts[0] / 1e9:.0f} -> {hosts[1] / 1e9:.0f} GB"] if hosts[1] != hosts[0] else []
    return ", ".join(parts)
