"""The planner's check before a stage is built: does this machine have the memory that the stage will need?"""

import socket
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlightgen.config import GPUS, Plan, Run, chip, method_for, plan_for
from fastlightgen.data.source import Source
from fastlightgen.models.cost import Network
from fastlightgen.models.families import network
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say, size
from fastlightgen.pipelines.export import vae_folder
from fastlightgen.planner.advice import faster, recipe_for
from fastlightgen.planner.budget import Budget, budget
from fastlightgen.planner.remedies import remedies, words
from fastlightgen.planner.step import undropped

CGROUP, MEMINFO, SELF = Path("/sys/fs/cgroup"), Path("/proc/meminfo"), Path("/proc/self/cgroup")
BOOT = Path("/proc/sys/kernel/random/boot_id")
UNKNOWN = 2**62  # bytes


def check_fit(cfg: Run, source: Source, device: torch.device, ratio: float | None = None) -> None:
    """Print what the stage will need; stop one that cannot fit, before anything large is read.

    `ratio`: the stage's turn is yet to come, after a Stage I that will drop this share of the blocks.
    """
    if cfg.fit == "off":
        return
    kind = kind_of(device)
    missing = ""
    try:
        guess = None if ratio is None else partial(undropped, ratio=ratio)
        config, keep = method_for(cfg).subject(cfg, guess)
        clip = source.largest()
    except (OSError, ValueError) as err:  # building the stage stops at it
        missing = str(err) or type(err).__name__
    if ranks.anyone(bool(missing)):  # all ranks leave together: what follows are collectives
        say(f"fit: not looked at: {missing or 'another rank cannot read its inputs'}")
        return
    frames, height, width = clip.x0.shape[2:]
    net = network(config, (frames, height, width), clip.cond.text.shape[1], fused=device.type == "cuda")
    plan = plan_of(cfg, ranks.size(), local_ranks(), kind or "h100")
    b = budget(net, plan, keep)
    room, host = (min(ranks.gathered(have)) for have in (gpu_free(device), host_free()))
    ahead = "" if ratio is None else " ahead, with blocks yet to be chosen"
    say(f"stage {cfg.stage}, planned{ahead}: {told(b, plan, room, host)}")
    if kind and b.seconds:
        say(
            f"  {b.flops / 1e15:.3g} PFLOP per GPU and iteration; {b.seconds:.3g} s, and {b.days:.3g} days in all, at "
            f"the {b.efficiency:.1%} of the peak that the paper's time implies (not measured here)"
        )
        for way in faster(net, plan, b, cfg.model):
            say(f"  shorter: {way}")
    if message := misfit(cfg, net, plan, keep, b, room, host):
        if cfg.fit == "refuse":
            raise ValueError(message)
        say(f"warning: {message}")


def told(b: Budget, plan: Plan, room: int, host: int) -> str:
    """The planned peak with its largest parts, and the memory that is free."""
    parts = sorted(b.gpu.items(), key=lambda part: -part[1])[:3]
    named = ", ".join(f"{name} {size(value)}" for name, value in parts)
    if plan.gpu == "cpu":
        return f"{size(b.peak)} per process ({named}), {size(b.host_peak)} of {known(host)} in this host"
    return f"{size(b.peak)} of {known(room)} per GPU ({named}), {size(b.host_peak)} of {known(host)} in its host"


def known(value: float) -> str:
    """Free bytes as text."""
    return "?" if value >= UNKNOWN else size(value)


def misfit(cfg: Run, net: Network, plan: Plan, keep: Sequence[int], b: Budget, room: int, host: int) -> str:
    """One line that names the memory that is too small and a change that helps; "" if everything fits."""
    on_gpu, recipe = plan.gpu != "cpu", recipe_for(cfg.model, plan)
    otherwise = f"{recipe}; {ANYWAY}" if recipe else ANYWAY
    if on_gpu and b.peak >= room:
        start = f"fit: the plan is {size(b.peak)} per GPU, {known(room)} are free"
        return f"{start}; {smaller(cfg, net, plan, keep, room)}; {otherwise}"
    if b.host_peak < host:
        return ""
    start = f"fit: the plan is {size(b.host_peak)} of host memory, {known(host)} are free"
    if on_gpu:
        change = "fewer processes per host" + (" or offload=none" if plan.offload != "none" else "")
        return f"{start}; use a larger host or {change}; {otherwise}"
    return f"{start}; {smaller(cfg, net, plan, keep, host * b.peak / b.host_peak)}; {ANYWAY}"


ANYWAY = "or start it anyway with fit=warn"


def smaller(cfg: Run, net: Network, plan: Plan, keep: Sequence[int], room: float) -> str:
    """The changes of training keys that make the plan fit, cheapest first, and the peak with them."""
    keys = {f.name for f in fields(cfg)}
    change: dict[str, Any] = {}
    peak = 0.0
    for more, after in remedies(net, plan, room, keep, keys):
        change |= more
        peak = after.peak
    if not change:
        return "use more or larger devices, or smaller clips: no key makes it smaller"
    enough = "" if peak < room else ", still too much: more or larger devices, or smaller clips"
    return f"use {words(change)}, which makes it {size(peak)} per process{enough}"


def plan_of(cfg: Run, processes: int, here: int, gpu: str) -> Plan:
    """A stage's configuration on `processes` processes, `here` of them on this host."""
    previews = cfg.data != "shapes" and bool(cfg.sample_every) and bool(vae_folder(cfg))
    return plan_for(cfg, gpus=processes, gpus_per_node=here, gpu=gpu, previews=previews)


def local_ranks() -> int:
    """The number of this run's processes on this host. They are counted, because Slurm sets no LOCAL_WORLD_SIZE."""
    boot = BOOT.read_text() if BOOT.is_file() else ""  # hosts of one image may all have one name
    hosts = ranks.gathered(ranks.digest((socket.gethostname(), boot)))
    return hosts.count(hosts[ranks.rank()])


def kind_of(device: torch.device) -> str | None:
    """The planner's name for a device; None for a GPU that the planner does not know."""
    if device.type != "cuda":
        return "cpu"
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    kinds = [kind for kind in GPUS if chip(kind) in name.lower()]
    return min(kinds, key=lambda kind: abs(GPUS[kind].memory - memory), default=None)


def gpu_free(device: torch.device) -> int:
    """Free bytes on a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else UNKNOWN


def host_free() -> int:
    """Free bytes of host memory, at most what the container or the scheduler's job allows."""
    if not MEMINFO.is_file():
        return UNKNOWN
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return min(int(line.split()[1]) * 1024, group_memory())


def group_memory() -> int:
    """Bytes left under the memory limits of this process's control groups (version 2), without reclaimable pages."""
    own = next((line[3:] for line in SELF.read_text().splitlines() if line.startswith("0::")), "/")
    left, folder = UNKNOWN, CGROUP / own.lstrip("/")
    for group in (folder, *folder.parents):
        limit, used = group / "memory.max", group / "memory.stat"
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            anon = next(int(line.split()[1]) for line in used.read_text().splitlines() if line.startswith("anon "))
            left = min(left, int(text) - anon)
        if group == CGROUP:
            break
    return left
