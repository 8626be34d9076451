"""What a step holds in a GPU's memory (or in that of a process on a CPU) and in a host's, part by part.

ZeRO as DeepSpeed documents it (estimate_zero3_model_states_mem_needs): per trained parameter 2 bytes for the bfloat16
weight, 4 for the gradient, 12 for AdamW's float32 weight and moments; of what passes through its buffers, what its
code holds at one time. bench/bench_plan.py compares with the memory that real steps take on a CPU.
"""

from fastlightgen.config import Plan
from fastlightgen.models.families import FAMILIES
from fastlightgen.planner.step import StepCost

RESERVED = 1.5e9  # the CUDA context and the collectives' own buffers
# On a CPU the program itself: torch, where something trains its optimizers and what they import (Triton), DeepSpeed.
PROGRAM = {("local", False): 0.26e9, ("local", True): 0.41e9, ("deepspeed", False): 0.43e9, ("deepspeed", True): 0.49e9}
BUCKET = 5e8  # DeepSpeed's default reduce_bucket_size, in numbers
SUBGROUP = 1e9  # its default sub_group_size: ZeRO-3's optimizer takes so many numbers at a time
REUSE = 1e9  # its default stage3_max_reuse_distance: what the backward pass needs again that soon stays gathered
HOST_FACTOR = 1.5  # DeepSpeed's allowance for buffers in host memory


def number(plan: Plan) -> int:
    """Bytes of a number in the compute type."""
    return 2 if plan.dtype == "bfloat16" else 4


def on_cpu(plan: Plan) -> bool:
    return plan.gpu == "cpu"


def model_states(step: StepCost, plan: Plan) -> dict[str, float]:
    """Weights, gradients and AdamW's states on one GPU, and float32 weights' copies in the compute type."""
    trained, frozen = sum(step.trained.values()), sum(step.frozen.values())
    largest = max(step.trained.values(), default=0)  # roles are updated one after the other
    if plan.engine == "local":  # autocast keeps what it has cast until the step ends
        copies = 2 * largest if plan.dtype == "bfloat16" else 0
        return {"weights": 4 * (trained + frozen) + copies, "gradients": 4 * largest, "optimizer states": 8 * trained}
    size = number(plan)
    weights = size * (trained + frozen) / (plan.gpus if plan.zero == 3 else 1)
    # zero=3 has room for all gradients all the time. Float32 gradients of bfloat16 ones are kept whole by zero=1.
    kept = trained if plan.zero == 3 else largest
    gradients = 4 * kept / (plan.gpus if plan.zero >= 2 or size == 4 else 1)
    states = 12 * trained / plan.gpus
    if plan.offload != "none":
        gradients, states = (0.0 if plan.zero >= 2 else size * kept), 0.0
    return {"weights": 0.0 if plan.offload == "all" else weights, "gradients": gradients, "optimizer states": states}


def averaged(step: StepCost, plan: Plan) -> float:
    """Bytes of the float32 averages of weights."""
    return 4 * step.averaged / (1 if plan.engine == "local" else plan.gpus)


def gathered(step: StepCost, plan: Plan) -> tuple[float, float]:
    """Under ZeRO-3 the weights that are whole at one time: of networks that train, with the gradient of one block, and
    of frozen ones."""
    if plan.engine == "local" or plan.zero < 3 or plan.gpus == 1:
        return 0.0, 0.0
    net, block = step.net, max(b.params for b in step.net.blocks)
    # Of each network this block and the next, which arrives in a buffer and is copied out of it. One that trains keeps,
    # for as long as the others run, what its backward pass will need soon.
    two = net.outside_params + 2 * block
    trained = sum(min(two + REUSE / 2, count) for count in step.trained.values())
    frozen = sum(min(two, count) for count in step.frozen.values())
    return number(plan) * (trained + (block if step.trained else 0)), number(plan) * frozen


def passing(step: StepCost, plan: Plan) -> tuple[float, float, float]:
    """DeepSpeed's buffers all the time, those of a backward pass, and the tensors of an optimizer step."""
    largest, cpu = max(step.trained.values(), default=0), on_cpu(plan)
    if plan.engine == "local":  # AdamW on a GPU takes the roots of all second moments at once
        return 0.0, 0.0, 0.0 if cpu else 4.0 * largest
    size = number(plan)
    bucket = size * min(BUCKET, largest)
    part = largest / plan.gpus
    if plan.zero == 3:  # a bucket for every role; to be scattered it is copied in the order of the ranks
        always, backward = size * sum(min(BUCKET, count) for count in step.trained.values()), bucket
        part = min(part, SUBGROUP)
    else:  # a second one where communication overlaps; at the end the gradients are laid out flat
        always, backward = 0.0, bucket * (1 if cpu else 2) + size * part
    # Gradients laid out flat once more, and as many roots of second moments; on a CPU a tensor more.
    update = 4 * part * (3 if cpu else 2) if plan.offload == "none" else 0.0
    return always, backward, update


def previews(step: StepCost, plan: Plan) -> tuple[float, float]:
    """The VAE that shows clips during training, and what it needs while it does."""
    if not plan.previews or not step.trained:
        return 0.0, 0.0
    family = FAMILIES[step.net.family]
    geometry, (weights, tile) = family.geometry, family.vae_memory
    frames, height, width = step.net.latent
    clip = 4 * 3 * geometry.frames(frames) * geometry.pixel_stride**2 * height * width  # float32, 3 colours
    return weights, max(tile + 1.4 * clip, 4.7 * clip)  # the second: tiles of a large picture while they are joined


def gpu_memory(step: StepCost, plan: Plan) -> dict[str, float]:
    """Of one GPU. The last part, which is negative, makes the sum the peak: no moment holds all of the others."""
    deepspeed, acts = plan.engine == "deepspeed", step.activations(number(plan))
    kept, block, working, forks = (step.clips * part for part in (acts.kept, acts.block, acts.working, acts.forks))
    always, backward, update = passing(step, plan)
    whole, frozen = gathered(step, plan)
    vae, shown = previews(step, plan)
    parts = model_states(step, plan) | {"averaged weights": averaged(step, plan), "VAE": vae}
    reserved = PROGRAM[plan.engine, bool(step.trained)] if on_cpu(plan) else RESERVED
    steady = sum(parts.values()) + always + reserved

    gradients = 0.0 if deepspeed and plan.zero == 3 else parts["gradients"]  # else made as activations are given back
    # And a CPU's buffers too: their pages come with the first write. Under ZeRO-3 a bucket that takes all gradients is
    # scattered once they are all there.
    late = max(step.trained.values(), default=0) <= BUCKET if plan.zero == 3 else on_cpu(plan)
    growing, at_once = (gradients + backward, 0.0) if deepspeed and late else (gradients, backward)
    moments = (
        kept + working + forks + whole + frozen,  # a forward pass, of this network or of one without gradient after it
        max(kept, growing) + block + whole + at_once,  # the backward pass, from one end to the other
        update + (0.0 if deepspeed else gradients),  # DeepSpeed's flat gradients take the place of the first
        shown,
    )
    parts |= {
        "activations kept": kept,
        "one block, backward": block,
        "one block, no gradient": working,
        "fork states": forks,
        "gathered blocks": whole + frozen,
        "optimizer step": update,
        "clips on their way out": shown,
        "buffers": always + backward + reserved,
    }
    rest = steady - gradients + max(moments) - sum(parts.values())
    return {name: value for name, value in parts.items() if value} | {"not at one moment": rest}


def loaded(step: StepCost, plan: Plan) -> float:
    """Bytes that one rank has in host memory while networks are read, besides its share of them.

    Files are read one tensor at a time (a block bounds it). Random weights are drawn for the whole network.
    """
    if plan.engine == "local":
        return 0.0
    return number(plan) * (step.net.params if step.drawn else max(b.params for b in step.net.blocks))


def host_memory(step: StepCost, plan: Plan, peak: float) -> dict[str, float]:
    """Of one host: what is read, what waits there (with DeepSpeed's allowance for buffers), a checkpoint's copy.

    `peak`: of a process, which on a CPU is in the host's memory too.
    """
    trained, frozen, size = sum(step.trained.values()), sum(step.frozen.values()), number(plan)
    here = min(plan.gpus, plan.gpus_per_node)
    share = here / plan.gpus
    parts = {"networks while they are read": here * loaded(step, plan), "processes": here * peak * on_cpu(plan)}
    if plan.offload == "all":
        parts["weights"] = HOST_FACTOR * size * (trained + frozen) * share
    if plan.offload != "none":
        parts["gradients"] = HOST_FACTOR * 4 * trained * share
        parts["optimizer states"] = HOST_FACTOR * 12 * trained * share
    parts["a checkpoint while it is written"] = (12 * trained + 4 * step.averaged) * share
    return {name: value for name, value in parts.items() if value}


def host_peak(parts: dict[str, float]) -> float:
    """The networks have been sharded before a checkpoint is written, and on a CPU before the first step."""
    rest = sum(parts.values()) - (read := parts.get("networks while they are read", 0.0))
    if "processes" in parts:
        return max(read, rest)
    return read + rest - min(read, parts.get("a checkpoint while it is written", 0.0))
