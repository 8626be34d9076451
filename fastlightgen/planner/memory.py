"""The memory of one step, part by part: of a GPU (or of a process on a CPU), and of a host.

Weights and optimizer states follow DeepSpeed's own formula (estimate_zero3_model_states_mem_needs): each trained
parameter takes 2 bytes for the bfloat16 weight, 4 for the gradient, 12 for AdamW's float32 weight and two moments. The
sizes of DeepSpeed's buffers were read from its code. bench/bench_plan.py compares the sums with the peak memory of real
steps on a CPU.
"""

from fastlightgen.config import Plan
from fastlightgen.models.families import FAMILIES
from fastlightgen.planner.step import StepCost

RESERVED = 1.5e9  # the CUDA context and the collectives' own buffers
# Bytes of the program itself on a CPU, by engine and by whether anything trains: torch, DeepSpeed, the optimizers and
# their imports (Triton).
PROGRAM = {("local", False): 0.26e9, ("local", True): 0.41e9, ("deepspeed", False): 0.43e9, ("deepspeed", True): 0.49e9}
BUCKET = 5e8  # DeepSpeed's default reduce_bucket_size, in numbers
SUBGROUP = 1e9  # its default sub_group_size: ZeRO-3's optimizer updates this many numbers at a time
REUSE = 1e9  # its default stage3_max_reuse_distance: weights that are needed again within so many numbers stay gathered
HOST_FACTOR = 1.5  # DeepSpeed's allowance for buffers in host memory


def number(plan: Plan) -> int:
    """Bytes of a number in the compute type."""
    return 2 if plan.dtype == "bfloat16" else 4


def on_cpu(plan: Plan) -> bool:
    """Does the plan count processes on a CPU in place of GPUs?"""
    return plan.gpu == "cpu"


def model_states(step: StepCost, plan: Plan) -> dict[str, float]:
    """Bytes on one GPU for weights (with autocast's copies), gradients and AdamW's states."""
    trained, frozen = sum(step.trained.values()), sum(step.frozen.values())
    largest = max(step.trained.values(), default=0)  # roles are updated one after the other
    if plan.engine == "local":  # autocast keeps its bfloat16 copies until the step ends
        copies = 2 * largest if plan.dtype == "bfloat16" else 0
        size = 4 if trained else number(plan)  # Stage I trains nothing and loads the weights in the compute type
        return {
            "weights": size * (trained + frozen) + copies,
            "gradients": 4 * largest,
            "optimizer states": 8 * trained,
        }
    size = number(plan)
    weights = size * (trained + frozen) / (plan.gpus if plan.zero == 3 else 1)
    # zero=3 reserves room for all gradients for the whole run. zero=1 keeps an unsharded float32 copy of bfloat16
    # gradients.
    kept = trained if plan.zero == 3 else largest
    gradients = 4 * kept / (plan.gpus if plan.zero >= 2 or size == 4 else 1)
    states = 12 * trained / plan.gpus
    if plan.offload != "none":
        gradients, states = (0.0 if plan.zero >= 2 else size * kept), 0.0
    return {"weights": 0.0 if plan.offload == "all" else weights, "gradients": gradients, "optimizer states": states}


def averaged(step: StepCost, plan: Plan) -> float:
    """Bytes of the float32 averages of weights."""
    return 4 * step.averaged / (1 if plan.engine == "local" else plan.gpus)


def float8(step: StepCost, plan: Plan) -> float:
    """Bytes of the float8 copies of the weights; zero=3 makes them of gathered weights, a layer at a time."""
    return 0.0 if plan.engine == "deepspeed" and plan.zero == 3 else float(step.float8)


def gathered(step: StepCost, plan: Plan) -> tuple[float, float]:
    """Bytes that ZeRO-3 holds gathered: (of networks that train, with one block's gradient; of frozen networks)."""
    if plan.engine == "local" or plan.zero < 3 or plan.gpus == 1:
        return 0.0, 0.0
    net, block = step.net, max(b.params for b in step.net.blocks)
    # Each network has the current block and the next one, which arrives in a buffer and is copied out of it. A network
    # that trains also keeps the weights that its backward pass will need soon, while the other networks run.
    two = net.outside_params + 2 * block
    trained = sum(min(two + REUSE / 2, count) for count in step.trained.values())
    frozen = sum(min(two, count) for count in step.frozen.values())
    return number(plan) * (trained + (block if step.trained else 0)), number(plan) * frozen


def passing(step: StepCost, plan: Plan) -> tuple[float, float, float]:
    """Bytes of DeepSpeed's buffers: (all the time, in a backward pass, in an optimizer step)."""
    largest, cpu = max(step.trained.values(), default=0), on_cpu(plan)
    if plan.engine == "local":  # AdamW on a GPU takes the roots of all second moments at once
        return 0.0, 0.0, 0.0 if cpu else 4.0 * largest
    size = number(plan)
    bucket = size * min(BUCKET, largest)
    part = largest / plan.gpus
    if plan.zero == 3:  # one bucket per role; scattering copies a bucket into the order of the ranks
        always, backward = size * sum(min(BUCKET, count) for count in step.trained.values()), bucket
        part = min(part, SUBGROUP)
    else:  # a second bucket where communication overlaps; at the end the gradients are copied into one flat tensor
        always, backward = 0.0, bucket * (1 if cpu else 2) + size * part
    # One more flat copy of the gradients, and the square roots of the second moments; a CPU needs a third tensor.
    update = 4 * part * (3 if cpu else 2) if plan.offload == "none" else 0.0
    return always, backward, update


def previews(step: StepCost, plan: Plan) -> tuple[float, float]:
    """Bytes of the VAE that shows clips during training: (its weights, decoding one clip)."""
    if not plan.previews or not step.trained:
        return 0.0, 0.0
    family = FAMILIES[step.net.family]
    geometry, (weights, tile) = family.geometry, family.vae_memory
    latent, height, width = step.net.latent
    frames = geometry.frames(latent)
    tile *= frames / family.tiled_frames if family.tiled_frames else 1
    clip = 4 * 3 * frames * geometry.pixel_stride**2 * height * width  # float32, 3 colours
    return weights, max(tile + 1.4 * clip, 4.7 * clip)  # the second: the tiles of a large picture while they are joined


def gpu_memory(step: StepCost, plan: Plan) -> tuple[dict[str, float], str]:
    """Memory of one GPU, part by part, at the moment of its peak; and the name of that moment."""
    deepspeed, acts = plan.engine == "deepspeed", step.activations(number(plan))
    kept, block, working, forks = (step.clips * part for part in (acts.kept, acts.block, acts.working, acts.forks))
    always, backward, update = passing(step, plan)
    trains, frozen = gathered(step, plan)
    vae, shown = previews(step, plan)
    reserved = PROGRAM[plan.engine, bool(step.trained)] if on_cpu(plan) else RESERVED
    steady = model_states(step, plan) | {"averaged weights": averaged(step, plan), "VAE": vae}
    steady["float8 weights"] = float8(step, plan)
    steady["buffers"] = always + reserved

    # Under ZeRO-3 all gradients are there from the start. Otherwise they grow while the activations are freed.
    gradients = 0.0 if deepspeed and plan.zero == 3 else steady.pop("gradients")
    # A CPU's buffers grow in the same way, because their pages come with the first write. Under ZeRO-3 a bucket that
    # holds all gradients is scattered at the end of the backward pass, when the activations are gone.
    late = max(step.trained.values(), default=0) <= BUCKET if plan.zero == 3 else on_cpu(plan)
    last = deepspeed and late  # the bucket comes with the last gradients
    flat = 0.0 if deepspeed else gradients  # DeepSpeed's flat gradients, which `update` counts, replace the others
    start = {"activations kept": kept, "gradient bucket": 0.0 if last else backward}
    end = {"gradients": gradients, "gradient bucket": backward}
    backwards = {"one block, backward": block, "gathered blocks": trains}
    moments = {
        "a forward pass": {
            "activations kept": kept,
            "one block, no gradient": working,
            "fork states": forks,
            "gathered blocks": trains + frozen,
        },
        "the start of a backward pass": start | backwards,
        "the end of a backward pass": end | backwards,
        "an optimizer step": {"gradients": flat, "optimizer step": update},
        "clips on their way out": {"clips on their way out": shown},
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    for name, value in moments[moment].items():
        steady[name] = steady.get(name, 0.0) + value
    return {name: value for name, value in steady.items() if value}, moment


def loaded(step: StepCost, plan: Plan) -> float:
    """Bytes of host memory that one rank needs to read a network, besides its own share of the weights.

    Files are read one tensor at a time; the largest block bounds its size. Random weights are drawn for all blocks.
    """
    if plan.engine == "local":
        return 0.0
    return number(plan) * (step.net.params if step.drawn else max(b.params for b in step.net.blocks))


def host_memory(step: StepCost, plan: Plan, peak: float) -> dict[str, float]:
    """Bytes of one host's memory by part; offloaded parts include DeepSpeed's allowance for buffers.

    `peak`: peak memory of one process. On a CPU it is host memory.
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
    """The peak of these parts: reading ends before the first step, so it never coincides with a checkpoint."""
    rest = sum(parts.values()) - (read := parts.get("networks while they are read", 0.0))
    if "processes" in parts:
        return max(read, rest)
    return read + rest - min(read, parts.get("a checkpoint while it is written", 0.0))
