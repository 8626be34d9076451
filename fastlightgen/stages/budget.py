"""From the cost of an iteration to the memory, traffic and time of a run on given machines. Arithmetic only.

ZeRO as DeepSpeed documents it (estimate_zero3_model_states_mem_needs): per trained parameter 2 bytes for the bfloat16
weight, 4 for the gradient, 12 for AdamW's float32 weight and moments. Nothing here is measured on a cluster.
"""

import math
from dataclasses import dataclass

from fastlightgen.config import preset
from fastlightgen.models.cost import Network, latent_size, network, token_shares
from fastlightgen.stages.cost import StepCost, dropped, step_cost


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
RESERVED = 1.5e9  # CUDA context and the collectives' own buffers: an allowance
BUCKET = 5e8  # DeepSpeed's default reduce_bucket_size, in numbers; two of them where communication overlaps
HOST_FACTOR = 1.5  # DeepSpeed's allowance for buffers in host memory
ITERS = {0: 2000, 2: 4000, 3: 1000}  # the stages' defaults

# App. A of the paper: 16 H100, batch 1 on each, ZeRO-3 with AdamW in host memory.
PAPER = {"model": "wan2.1-i2v-14b", "size": (480, 832, 81), "gpus": 16, "gpu_days": {2: 64, 3: 16}}


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
    efficiency: float
    seconds: float  # per iteration
    iters: int
    gpu_days: float

    @property
    def peak(self) -> float:
        return sum(self.gpu.values())


def load_network(config: dict, size: str, text_tokens: int) -> Network:
    """The network of a config.json at the size "HEIGHTxWIDTHxFRAMES"."""
    numbers = size.lower().split("x")
    if len(numbers) != 3 or not all(n.isdecimal() for n in numbers):
        raise ValueError(f"size={size}: wanted HEIGHTxWIDTHxFRAMES in pixels, for example size=480x832x81")
    return network(config, latent_size(*map(int, numbers)), text_tokens)


def paper_efficiency(stage: int) -> float:
    """The share of an H100's peak at which this stage, as planned here, takes the paper's GPU-days.

    64 days x 86400 s / 16 GPUs / 4000 iterations = 86.4 s per iteration, and 16 days / 16 / 1000 the same. The
    paper does not give its resolution; 480 x 832, 81 frames is an assumption. Stages 0 and 1 take Stage II's share.
    """
    stage = 3 if stage == 3 else 2
    net = network(preset(PAPER["model"])["network"], latent_size(*PAPER["size"]))
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


def budget(net: Network, cfg) -> Budget:
    """The plan of one run; `cfg` holds the keys of the plan command."""
    stage = int(cfg.stage)
    if net.heads % cfg.sequence_parallel:
        raise ValueError(
            f"sequence_parallel={cfg.sequence_parallel}: does not divide the network's {net.heads} heads; "
            f"take one of {', '.join(str(n) for n in range(1, net.heads + 1) if net.heads % n == 0)}"
        )
    step = step_cost(stage, net, dropped(len(net.blocks), cfg.ratio, cfg.prefix), cfg)
    groups = cfg.gpus // cfg.sequence_parallel  # each works on clips of its own
    samples = cfg.batch * cfg.accumulation / cfg.sequence_parallel  # clips' worth of tokens per GPU and iteration
    flops = step.total("flops") * samples
    peak = getattr(GPU[cfg.gpu], cfg.dtype)
    efficiency = cfg.efficiency or paper_efficiency(stage)
    seconds = flops / (efficiency * peak)
    iters = cfg.iters or ITERS.get(stage) or math.ceil(cfg.clips / (cfg.batch * groups)) * cfg.timesteps
    gathers, wire, bus = traffic(step, cfg)
    return Budget(
        gpu=gpu_memory(step, cfg),
        host=host_memory(step, cfg),
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


def model_states(step: StepCost, cfg) -> dict[str, float]:
    """Weights, gradients and AdamW's states on one GPU, and float32 weights' copies in the compute type."""
    trained, frozen = sum(step.trained.values()), sum(step.frozen.values())
    if cfg.engine == "local":  # one role's gradients at a time; autocast keeps what it has cast until the step ends
        copies = 2 * max(step.trained.values(), default=0) if cfg.dtype == "bfloat16" else 0
        gradients = 4 * max(step.trained.values(), default=0)
        return {"weights": 4 * (trained + frozen) + copies, "gradients": gradients, "optimizer states": 8 * trained}
    size = number(cfg)
    weights = size * (trained + frozen) / (cfg.gpus if cfg.zero == 3 else 1)
    gradients = 4 * trained / (cfg.gpus if cfg.zero >= 2 else 1)
    states = (12 if size == 2 else 8) * trained / (cfg.gpus if cfg.zero >= 1 else 1)
    if cfg.offload != "none":
        gradients, states = (0.0 if cfg.zero >= 2 else size * trained), 0.0
    return {"weights": 0.0 if cfg.offload == "all" else weights, "gradients": gradients, "optimizer states": states}


def number(cfg) -> int:
    """Bytes of a number in the compute type."""
    return 2 if cfg.dtype == "bfloat16" else 4


def gpu_memory(step: StepCost, cfg) -> dict[str, float]:
    """The parts' sum bounds the peak: not all of them are at their largest at one moment."""
    size, sharded = number(cfg), cfg.engine == "deepspeed" and cfg.zero == 3 and cfg.gpus > 1
    share = cfg.batch * busiest(step.net, cfg)
    kept, block, states, widest = (share * part for part in step.peak(size))
    largest = max(b.params for b in step.net.blocks)
    parts = model_states(step, cfg)
    parts["activations kept"] = kept
    parts["one block, " + ("computed again" if cfg.checkpointing and step.trained else "working")] = block + widest
    # This block's weights and the next one's, this one's gradient, and what lies outside the blocks.
    gathered = size * (largest * (3 if step.trained else 2) + step.net.outside_params)
    parts["gathered blocks"] = gathered if sharded else 0.0
    parts["fork states"] = states
    buckets = 2 * BUCKET * size if cfg.engine == "deepspeed" and cfg.gpus > 1 and step.trained else 0.0
    parts["buffers"] = buckets + RESERVED
    return parts


def busiest(net: Network, cfg) -> float:
    """The largest part of a clip's tokens on one GPU: rows or columns of patches, which need not come out even."""
    frames, height, width = net.latent
    _, sizes = token_shares((frames, height // 2, width // 2), cfg.sequence_parallel)
    return max(sizes) / sum(sizes)


def host_memory(step: StepCost, cfg) -> dict[str, float]:
    """Of one host, with DeepSpeed's allowance for its buffers."""
    trained, frozen, size = sum(step.trained.values()), sum(step.frozen.values()), number(cfg)
    share = HOST_FACTOR * min(cfg.gpus, cfg.gpus_per_node) / cfg.gpus
    if cfg.offload == "none":
        return {}
    parts = {"gradients": 4 * trained * share, "optimizer states": (12 if size == 2 else 8) * trained * share}
    return ({"weights": size * (trained + frozen) * share} if cfg.offload == "all" else {}) | parts


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
        hidden = cfg.batch * cfg.accumulation * step.net.hidden * size / sp
        wire["attention"] = 4 * rounds * hidden * (sp - 1) / sp
    moved = sum(step.updates[role] * count for role, count in step.trained.items())
    bus = 2 * size * moved / gpus if cfg.offload != "none" else 0.0  # gradients out, weights back
    if cfg.offload == "all":
        bus += cfg.accumulation * size * (step.total("gathered") + step.total("grad_gathered")) / gpus
    return gathers, wire, bus
