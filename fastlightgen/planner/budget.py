"""Memory, traffic and time of a run on given machines, from the cost of one iteration.

This is arithmetic: nothing here was measured on a cluster.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fastlightgen.config import GPUS, Plan, plan_root, preset, recipe
from fastlightgen.config.limits import sides
from fastlightgen.models.cost import Network
from fastlightgen.models.families import FAMILIES, family_of, network
from fastlightgen.parallel.shares import Part, divisors, token_shares
from fastlightgen.planner.memory import gpu_memory, host_memory, host_peak, number
from fastlightgen.planner.step import StepCost, planned_step, undropped


@dataclass(frozen=True)
class Paper:
    """App. A of the paper: 16 H100, batch 1 on each, ZeRO-3 with AdamW in host memory."""

    model: str = "wan2.1-i2v-14b"
    size: str = "480x832x81"  # an assumption: the paper does not give its resolution
    gpus: int = 16
    stage2: tuple[int, int] = (64, 4000)  # GPU-days, iterations
    stage3: tuple[int, int] = (16, 1000)


PAPER = Paper()


@dataclass(frozen=True)
class Budget:
    """A plan in bytes, operations and seconds; each number is for one GPU unless its comment says otherwise."""

    gpu: dict[str, float]  # bytes by part, at the moment of the peak
    moment: str  # the name of that moment
    host: dict[str, float]  # bytes in one host's memory by part
    flops: float  # per iteration
    recomputed: float  # the part of `flops` that a backward pass computes a second time
    calls: float  # block evaluations per clip and iteration
    gathers: float  # of one block's weights, per iteration
    wire: dict[str, float]  # bytes received from other GPUs per iteration, by kind
    bus: float  # bytes between GPU and host memory per iteration
    efficiency: float  # share of the GPU's peak; 0 on a CPU, where it is unknown
    seconds: float  # per iteration
    iters: int
    gpu_days: float

    @property
    def peak(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_peak(self) -> float:
        return host_peak(self.host)

    @property
    def days(self) -> float:
        """Duration of the run, by the clock."""
        return self.seconds * self.iters / 86400


def load_network(config: dict, size: str, text_tokens: int, fused: bool = True) -> Network:
    """The network of a config.json at the size "HEIGHTxWIDTHxFRAMES"."""
    numbers = sides("size", size)
    if len(numbers) != 3:
        raise ValueError(f"size={size}: wanted HEIGHTxWIDTHxFRAMES in pixels, for example size=480x832x81")
    latent = family_of(config).geometry.latent_size(*numbers)
    return network(config, latent, text_tokens, fused)


@cache
def paper_operations() -> dict[str, float]:
    """The planned operations of one of the paper's 16 GPUs in all iterations of a stage, by stage.

    Stage II is Eq. 6 as printed. The paper is silent on the critic's settings in Stage III, which are DMD2's, and on
    recomputation, which its network needs at this size.
    """
    settings = recipe("paper")
    eq6 = plan_root("2")(**settings["stage2"] | {"target": "self", "checkpointing": True})
    eq8 = plan_root("3")(**settings["stage3"] | {"checkpointing": True})
    net = load_network(preset(PAPER.model)["network"], PAPER.size, 0)
    keep = undropped(len(net.blocks), 0.3)
    return {
        "2": planned_step(net, eq6, keep).total("flops") * PAPER.stage2[1],
        "3": planned_step(net, eq8, keep).total("flops") * PAPER.stage3[1],
    }


def paper_efficiency() -> float:
    """The share of an H100's peak at which both stages of the paper together take its 64 + 16 GPU-days.

    The paper gives 86.4 s per iteration for both stages, although Stage III computes more. So one share for all stages
    can only match their sum.
    """
    seconds = (PAPER.stage2[0] + PAPER.stage3[0]) * 86400 / PAPER.gpus
    return sum(paper_operations().values()) / seconds / GPUS["h100"].bfloat16


def busiest(net: Network, plan: Plan) -> float:
    """The largest share of a clip's tokens on one GPU; rows or columns of patches may not divide evenly."""
    if plan.sequence_parallel == 1:
        return 1.0
    _, sizes = token_shares(FAMILIES[net.family].geometry.grid(net.latent), plan.sequence_parallel)
    return max(sizes) / sum(sizes)


def budget(net: Network, plan: Plan, keep: Sequence[int] | None = None) -> Budget:
    """The plan of one run. `keep`: the blocks of the pruned path; None: the middle ones are taken to be dropped."""
    if net.heads % plan.sequence_parallel:
        raise ValueError(
            f"sequence_parallel={plan.sequence_parallel}: does not divide the network's {net.heads} heads; "
            f"use one of {divisors(net.heads)}"
        )
    keep = keep or undropped(len(net.blocks), plan.dropped, plan.prefix)
    step = planned_step(net.divided(Part(busiest(net, plan), plan.sequence_parallel)), plan, keep)
    samples = step.clips * step.accumulation
    flops = step.total("flops") * samples
    efficiency = seconds = 0.0
    if plan.gpu in GPUS:
        efficiency = plan.efficiency or paper_efficiency()
        seconds = flops / (efficiency * getattr(GPUS[plan.gpu], plan.dtype))
    iters = math.ceil(step.count / plan.groups) if step.count else int(vars(plan)["iters"])
    gathers, wire, bus = traffic(step, plan)
    gpu, moment = gpu_memory(step, plan)
    return Budget(
        gpu=gpu,
        moment=moment,
        host=host_memory(step, plan, sum(gpu.values())),
        flops=flops,
        recomputed=step.total("recompute") * samples,
        calls=step.total("calls"),
        gathers=gathers,
        wire=wire,
        bus=bus,
        efficiency=efficiency,
        seconds=seconds,
        iters=iters,
        gpu_days=seconds * iters * plan.gpus / 86400,
    )


def traffic(step: StepCost, plan: Plan) -> tuple[float, dict[str, float], float]:
    """Block gathers, bytes received from other GPUs by kind, and bytes between GPU and host, in one iteration."""
    size, gpus, sp = number(plan), plan.gpus, plan.sequence_parallel
    others = (gpus - 1) / gpus
    reduced = size * others * sum(step.updates[role] * count for role, count in step.trained.items())
    wire: dict[str, float] = {}
    gathers = 0.0
    if plan.engine == "deepspeed" and gpus > 1:
        if plan.zero == 3:
            gathers = step.accumulation * (step.total("gathers") + step.total("grad_gathers"))
            parameters = step.total("gathered") + step.total("grad_gathered")
            wire["weights"] = step.accumulation * size * others * parameters
        elif step.trained:
            wire["weights"] = reduced  # once after the update
        if step.trained:
            wire["gradients"] = reduced * (step.accumulation if plan.zero >= 2 else 1)
    if sp > 1:  # q, k, v and the output of every attention change between shares of tokens and shares of heads
        backward = 2 if step.recomputes else 1
        rounds = step.total("calls") + backward * step.total("grad_calls")
        changed = 4 * step.net.hidden - 3 * step.net.text_hidden  # of the text, which all have, only the output
        wire["attention"] = step.clips * step.accumulation * size * rounds * changed * (sp - 1) / sp
    moved = sum(step.updates[role] * count for role, count in step.trained.items())
    bus = 2 * size * moved / gpus if plan.offload != "none" else 0.0  # gradients out, weights back
    if plan.offload == "all":
        bus += step.accumulation * size * (step.total("gathered") + step.total("grad_gathered")) / gpus
    return gathers, wire, bus
