"""Before a stage is built: what it will need by the planner's arithmetic, and whether this machine has it."""

import socket
from dataclasses import fields
from pathlib import Path

import torch

from fastlightgen.blocks import read_importance
from fastlightgen.config import Plan
from fastlightgen.data.source import Source
from fastlightgen.models.cost import Network
from fastlightgen.models.families import block_counts, network
from fastlightgen.models.folder.weights import config_of, read_card, trained_folder
from fastlightgen.parallel import ranks
from fastlightgen.parallel.log import say
from fastlightgen.pipelines.export import vae_folder
from fastlightgen.planner.budget import Budget, budget
from fastlightgen.planner.remedies import remedies, words
from fastlightgen.planner.step import dropped

CGROUP, MEMINFO, SELF = Path("/sys/fs/cgroup"), Path("/proc/meminfo"), Path("/proc/self/cgroup")
BOOT = Path("/proc/sys/kernel/random/boot_id")
UNKNOWN = 2**62  # bytes
KINDS = {"H100": "h100-80gb", "H200": "h200", "A100": "a100-80gb", "4090": "4090"}  # in the names that torch reports


def check_fit(cfg, source: Source, device: torch.device, ratio: float | None = None) -> None:
    """Say what the stage will need; stop one that cannot fit, before anything large is read.

    `ratio`: the stage's turn is yet to come, after a Stage I that will drop this share of the blocks.
    """
    if cfg.fit == "off":
        return
    kind = kind_of(device)
    missing = ""
    try:
        config, drop = subject(cfg) if ratio is None else foreseen(cfg, ratio)
        clip = source.largest()
    except (OSError, ValueError) as err:  # building the stage stops at it
        missing = str(err) or type(err).__name__
    if ranks.anyone(bool(missing)):  # all ranks leave together: what follows are collectives
        say(f"fit: not looked at: {missing or 'another rank cannot read its inputs'}")
        return
    net = network(config, tuple(clip.x0.shape[2:]), clip.cond.text.shape[1], fused=device.type == "cuda")
    plan = plan_of(cfg, ranks.size(), local_ranks(), kind or "h100-80gb")
    b = budget(net, plan, drop)
    room, host = (min(ranks.gathered(have)) for have in (gpu_free(device), host_free()))
    ahead = "" if ratio is None else " ahead, with blocks yet to be chosen"
    say(f"stage {cfg.stage}, planned{ahead}: {told(b, plan, room, host)}")
    if kind and b.seconds:
        say(
            f"  {b.flops / 1e15:.3g} PFLOP per GPU and iteration; {b.seconds:.3g} s, and {b.gpu_days:.3g} GPU-days in "
            f"all, at the {b.efficiency:.1%} of the peak that the paper's time implies (not measured here)"
        )
    if message := misfit(cfg, net, plan, drop, b, room, host):
        if cfg.fit == "refuse":
            raise ValueError(message)
        say(f"warning: {message}")


def told(b: Budget, plan: Plan, room: int, host: int) -> str:
    """The peak by its largest parts, and what there is."""
    parts = sorted(b.gpu.items(), key=lambda part: -part[1])[:3]
    named = ", ".join(f"{name} {size(value)}" for name, value in parts)
    if plan.gpu == "cpu":
        return f"{size(b.peak)} GB per process ({named}), {size(b.host_peak)} of {size(host)} GB in this host"
    return f"{size(b.peak)} of {size(room)} GB per GPU ({named}), {size(b.host_peak)} of {size(host)} GB in its host"


def size(value: float) -> str:
    """In GB."""
    return "?" if value >= UNKNOWN else f"{value / 1e9:.1f}" if value >= 5e7 else f"{value / 1e9:.3f}"


def misfit(cfg, net: Network, plan: Plan, drop: list[int], b: Budget, room: int, host: int) -> str:
    """One line on what does not fit and what would; empty if all does."""
    on_gpu = plan.gpu != "cpu"
    if on_gpu and b.peak >= room:
        start = f"fit: the plan is {size(b.peak)} GB per GPU, {size(room)} GB are free"
        return f"{start}; {smaller(cfg, net, plan, drop, room)}; {ANYWAY}"
    if b.host_peak < host:
        return ""
    start = f"fit: the plan is {size(b.host_peak)} GB of host memory, {size(host)} GB are free"
    if on_gpu:
        change = "fewer processes per host" + (" or offload=none" if plan.offload != "none" else "")
        return f"{start}; use a larger host or {change}; {ANYWAY}"
    return f"{start}; {smaller(cfg, net, plan, drop, host * b.peak / b.host_peak)}; {ANYWAY}"


ANYWAY = "or start it anyway with fit=warn"


def smaller(cfg, net: Network, plan: Plan, drop: list[int], room: float) -> str:
    """The changes in the keys of training, cheapest first, and what they come to."""
    keys = {f.name for f in fields(cfg)} | {"accumulation"}
    change: dict = {}
    peak = 0.0
    for more, after in remedies(net, plan, room, drop, keys):
        change |= more
        peak = after.peak
    if change.pop("accumulation", 0) and cfg.stage != "1":
        change = {("micro_batch" if k == "batch" else k): v for k, v in change.items()}
    if not change:
        return "use more or larger devices, or smaller clips: no key makes it smaller"
    enough = "" if peak < room else ", still too much: more or larger devices, or smaller clips"
    return f"use {words(change)}, which makes it {size(peak)} GB per process{enough}"


def subject(cfg) -> tuple[dict, list[int]]:
    """The network that a stage starts from, and the blocks that its pruned path leaves out."""
    if cfg.stage == "3":
        folder = Path(cfg.stage2_model or Path(cfg.run) / "stage2" / "model")
        config, keep = config_of(folder), read_card(folder).get("pruned_path") or []
        return config, [i for i in range(depth(config)) if i not in keep]
    if cfg.stage == "2":
        config = config_of(trained_folder(cfg.teacher or cfg.model))
        ranking = read_importance(cfg.importance or Path(cfg.run) / "stage1" / "importance.json", depth(config))
        return config, list(ranking["pruned"]) if cfg.drop == "joint" else []  # independent coins may keep every block
    return config_of(cfg.init or cfg.model) if cfg.stage == "0" else config_of(trained_folder(cfg.model)), []


def foreseen(cfg, ratio: float) -> tuple[dict, list[int]]:
    """What `subject` will find, as far as can be said: the model's network, and as many of its middle blocks."""
    if cfg.importance if cfg.stage == "2" else cfg.stage2_model:
        return subject(cfg)
    config = config_of(trained_folder((cfg.stage == "2" and cfg.teacher) or cfg.model))
    joint = cfg.stage == "3" or cfg.drop == "joint"
    return config, dropped(depth(config), ratio, -1) if joint else []


def depth(config: dict) -> int:
    return sum(block_counts(config).values())


def plan_of(cfg, processes: int, here: int, gpu: str) -> Plan:
    """A stage's configuration on so many processes, `here` of them on this host, in the planner's keys."""
    own = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    if cfg.stage == "3":
        own["critics"] = own["ratio"]
    if cfg.stage == "2" and cfg.estimator == "full":
        del own["p"]  # of the coin of estimator=sampled
    groups = max(1, processes // own.get("sequence_parallel", 1))
    own["previews"] = cfg.data != "shapes" and bool(cfg.sample_every) and bool(vae_folder(cfg))
    own["gpus"], own["gpus_per_node"], own["gpu"] = processes, here, gpu
    if cfg.stage == "1":
        own["batch"] = min(cfg.batch, cfg.clips)
    else:
        own["batch"] = cfg.micro_batch or max(1, cfg.batch // groups)
        own["accumulation"] = max(1, cfg.batch // (own["batch"] * groups))
    taken = {f.name for f in fields(Plan)} - {"ratio", "prefix", "table", "out", "dry_run"}
    return Plan(**{key: value for key, value in own.items() if key in taken})


def local_ranks() -> int:
    """Processes of this run on this host; counted, because Slurm's ranks have no LOCAL_WORLD_SIZE."""
    boot = BOOT.read_text() if BOOT.is_file() else ""  # hosts of one image may all have one name
    hosts = ranks.gathered(ranks.digest((socket.gethostname(), boot)))
    return hosts.count(hosts[ranks.rank()])


def kind_of(device: torch.device) -> str | None:
    """The planner's name of a device, None for a GPU that it does not know."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    return next((kind for part, kind in KINDS.items() if part in name), None)


def gpu_free(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else UNKNOWN


def host_free() -> int:
    """Bytes that are free in this host, or in the share of it that a container or a scheduler's job may use."""
    if not MEMINFO.is_file():
        return UNKNOWN
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable"))
    return min(int(line.split()[1]) * 1024, group_memory())


def group_memory() -> int:
    """What the control groups of this process leave it: their limit less what cannot be given back (version 2)."""
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
