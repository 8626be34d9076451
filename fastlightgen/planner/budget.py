"""From the cost of an iteration to the memory, traffic and time of a run on given machines. Arithmetic only.

Nothing here is measured on a cluster.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastlightgen.config import preset
from fastlightgen.models.cost import Network
from fastlightgen.models.families import FAMILIES, family_of, network
from fastlightgen.parallel.shares import Part, divisors, token_shares
from fastlightgen.planner.memory import gpu_memory, host_memory, host_peak, number
from fastlightgen.planner.step import StepCost, dropped, step_cost


@dataclass(frozen=True)
class Gpu:
    """Bytes of memory and dense operations per second, from the makers' data sheets."""

    memory: float
    bfloat16: float
    float32: float


GPU = {
    "h100-80gb": Gpu(80e9, 989e12, 67e12),
    "h200": Gpu(141e9, 989e12, 67e12),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12),
    "4090": Gpu(24e9, 165e12, 82.6e12),
}
ITERS = {0: 2000, 2: 4000, 3: 1000}  # the stages' defaults

# App. A of the paper: 16 H100, batch 1 on each, ZeRO-3 with AdamW in host memory.
PAPER = {"model": "wan2.1-i2v-14b", "size": "480x832x81", "gpus": 16, "gpu_days": {2: 64, 3: 16}}


@dataclass(frozen=True)
class Budget:
    """Per GPU unless the name says otherwise. Bytes, operations, seconds."""

    gpu: dict[str, float]  # bytes by part
    host: dict[str, float]  # bytes in one host's memory by part
    flops: float  # per iteration
    recomputed: float  # those of them that a backward pass computes again
    calls: float  # block evaluations in one sample's iteration
    gathers: float
    wire: dict[str, float]  # bytes received from other GPUs per iteration, by kind
    bus: float  # bytes between GPU and host memory per iteration
    efficiency: float  # 0 where nothing is known of it: on a CPU
    seconds: float  # per iteration
    iters: int
    gpu_days: float

    @property
    def peak(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_peak(self) -> float:
        return host_peak(self.host)


def load_network(config: dict, size: str, text_tokens: int, fused: bool = True) -> Network:
    """The network of a config.json at the size "HEIGHTxWIDTHxFRAMES"."""
    numbers = size.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"size={size}: wanted HEIGHTxWIDTHxFRAMES in pixels, for example size=480x832x81")
    latent = family_of(config).geometry.latent_size(*map(int, numbers))
    return network(config, latent, text_tokens, fused)


def paper_efficiency(stage: int) -> float:
    """The share of an H100's peak at which this stage, as planned here, takes the paper's GPU-days.

    64 days x 86400 s / 16 GPUs / 4000 iterations = 86.4 s per iteration, and 16 days / 16 / 1000 the same. The
    paper does not give its resolution; 480 x 832, 81 frames is an assumption. Stages 0 and 1 take Stage II's share.
    """
    stage = 3 if stage == 3 else 2
    net = load_network(preset(PAPER["model"])["network"], PAPER["size"], 0)
    step = step_cost(stage, net, dropped(len(net.blocks), 0.3, -1), PaperKeys())
    seconds = PAPER["gpu_days"][stage] * 86400 / PAPER["gpus"] / ITERS[stage]
    return step.total("flops") / seconds / GPU["h100-80gb"].bfloat16


@dataclass(frozen=True)
class PaperKeys:
    """The paper's settings where they decide the cost; it is silent on the critic's, which are DMD2's."""

    batch: int = 1
    checkpointing: bool = True
    keep_attention: int = 0
    alpha: float = 1.0
    target: str = "self"  # Eq. 6 as printed
    kappa_unpruned: float = 0.0
    estimator: str = "full"
    steps: int = 4
    rollout: str = "simulate"
    critics: int = 5
    count: str = "outer"
    fake_arch: str = "pruned"
    fake_mode: str = "copy"
    strong: str = "stage2"


def busiest(net: Network, cfg) -> float:
    """The largest part of a clip's tokens on one GPU: rows or columns of patches, which need not come out even."""
    if cfg.sequence_parallel == 1:
        return 1.0
    _, sizes = token_shares(FAMILIES[net.family].geometry.grid(net.latent), cfg.sequence_parallel)
    return max(sizes) / sum(sizes)


def budget(net: Network, cfg, drop: Sequence[int] | None = None) -> Budget:
    """The plan of one run; `cfg` holds the keys of the plan command. `drop`: the blocks, where they are known."""
    stage = int(cfg.stage)
    if net.heads % cfg.sequence_parallel:
        raise ValueError(
            f"sequence_parallel={cfg.sequence_parallel}: does not divide the network's {net.heads} heads; "
            f"use one of {divisors(net.heads)}"
        )
    drop = dropped(len(net.blocks), cfg.ratio, cfg.prefix) if drop is None else drop
    step = step_cost(stage, net.divided(Part(busiest(net, cfg), cfg.sequence_parallel)), drop, cfg)
    groups = cfg.gpus // cfg.sequence_parallel  # each works on clips of its own
    samples = cfg.batch * cfg.accumulation
    flops = step.total("flops") * samples
    efficiency = seconds = 0.0
    if cfg.gpu in GPU:
        efficiency = cfg.efficiency or paper_efficiency(stage)
        seconds = flops / (efficiency * getattr(GPU[cfg.gpu], cfg.dtype))
    iters = cfg.iters or ITERS.get(stage) or math.ceil(cfg.clips / (cfg.batch * groups)) * cfg.timesteps
    gathers, wire, bus = traffic(step, cfg)
    gpu = gpu_memory(step, cfg)
    return Budget(
        gpu=gpu,
        host=host_memory(step, cfg, sum(gpu.values())),
        flops=flops,
        recomputed=step.total("recompute") * samples,
        calls=step.total("calls"),
        gathers=gathers,
        wire=wire,
        bus=bus,
        efficiency=efficiency,
        seconds=seconds,
        iters=iters,
        gpu_days=seconds * iters * cfg.gpus / 86400,
    )


def traffic(step: StepCost, cfg) -> tuple[float, dict[str, float], float]:
    """Block gathers, bytes received from other GPUs by kind, and bytes between GPU and host, in one iteration."""
    size, gpus, sp = number(cfg), cfg.gpus, cfg.sequence_parallel
    others = (gpus - 1) / gpus
    reduced = size * others * sum(step.updates[role] * count for role, count in step.trained.items())
    wire: dict[str, float] = {}
    gathers = 0.0
    if cfg.engine == "deepspeed" and gpus > 1:
        if cfg.zero == 3:
            gathers = cfg.accumulation * (step.total("gathers") + step.total("grad_gathers"))
            parameters = step.total("gathered") + step.total("grad_gathered")
            wire["weights"] = cfg.accumulation * size * others * parameters
        elif step.trained:
            wire["weights"] = reduced  # once after the update; zero=0: the other half of an all-reduce
        if step.trained:
            wire["gradients"] = reduced * (cfg.accumulation if cfg.zero >= 2 else 1)
    if sp > 1:  # q, k, v and the output of every attention change between shares of tokens and shares of heads
        backward = 2 if cfg.checkpointing else 1
        rounds = step.total("calls") + backward * step.total("grad_calls")
        changed = 4 * step.net.hidden - 3 * step.net.text_hidden  # of the text, which all have, only the output
        wire["attention"] = cfg.batch * cfg.accumulation * size * rounds * changed * (sp - 1) / sp
    moved = sum(step.updates[role] * count for role, count in step.trained.items())
    bus = 2 * size * moved / gpus if cfg.offload != "none" else 0.0  # gradients out, weights back
    if cfg.offload == "all":
        bus += cfg.accumulation * size * (step.total("gathered") + step.total("grad_gathered")) / gpus
    return gathers, wire, bus
