"""Time a step of Stage II and of Stage III against the same step with diffusers' classes, and check the planner.

Wan 1.3B at 480 x 832 x 81 in bfloat16 with activation checkpointing; without a GPU a small network in float32. Losses,
engine and optimizer are the same code: only the networks differ (stock.py). Both must have the same loss. torch takes
its own FlashAttention for diffusers, ours asks for cuDNN's: "diffusers, cuDNN" takes that too. A step of Stage III here
is one update of the student and one of the critic. `GB` is the peak of torch's allocator in the timed
steps, `planned_GB` what `plan` says for ours.
"""

import copy
import gc
import math
from collections.abc import Callable

import kernels
import pytest
import torch
from device_time import Samples
from kernels import DEVICE, GPU
from peers import imported, with_cudnn
from stock import Stock
from timing import seconds
from torch import nn

from fastlightgen.config import Run, load, preset
from fastlightgen.data.source import Batch
from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.roles import Stage
from fastlightgen.models.base import Cond
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import build
from fastlightgen.planner.budget import budget
from fastlightgen.planner.fit import kind_of, plan_of
from fastlightgen.planner.step import dropped, undropped
from fastlightgen.rng import generator, rows
from fastlightgen.stages.distill import Distill
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.prune import Prune

pytestmark = kernels.RECORDED
SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 6, "text_dim": 64}
CONFIG = preset("wan2.1-t2v-1.3b")["network"] | ({} if GPU else SMALL)
LATENT, TEXT = ((21, 60, 104), 512) if GPU else ((2, 8, 8), 16)
BLOCKS, ROUNDS = CONFIG["num_layers"], 2
WORDS = f"run=unused batch=1 checkpointing={str(GPU).lower()} dtype={'bfloat16' if GPU else 'float32'}".split()
STAGES = {"stage II": ["stage=2", "text_dropout=0"], "stage III": ["stage=3", "critic_start=0"]}
LOSSES: dict[tuple[str, str], float] = {}  # (stage, contender) -> loss of the first update


def batches(step: int) -> Batch:
    gen, count = generator(0, step), len(rows(1))
    shapes = (CONFIG["in_channels"], *LATENT), (TEXT, CONFIG["text_dim"]), (TEXT, CONFIG["text_dim"])
    x0, cond, null = (torch.randn(count, *shape, generator=gen).to(DEVICE) for shape in shapes)
    return Batch(x0, Cond(cond), Cond(null))


def stage_of(name: str, cfg: Run, net: nn.Module) -> Stage:
    """The stage on one network's weights: target, teacher, student and critic are copies."""
    drop = dropped(BLOCKS, 0.3)
    keep = [i for i in range(BLOCKS) if i not in drop]
    net.checkpointing = cfg.checkpointing
    if name == "stage II":
        return Prune(cfg, net, drop, batches, lambda: batches(0), {})
    student, fake = (copy.deepcopy(net).prune(keep) for _ in range(2))
    teacher = net.requires_grad_(False)
    return Distill(cfg, Networks(student, teacher, keep, fake, None, fake, False, None), batches, {})


def stepper(name: str, cfg: Run, net: nn.Module) -> tuple[Callable[[], None], list[float]]:
    """A call that takes the first step of the stage again, and the losses of its first update so far."""
    stage, engine, losses = stage_of(name, cfg, net), LocalEngine(torch.device(DEVICE), cfg.dtype), []
    engine.prepare(stage)
    for frozen in stage.frozen:
        engine.place(frozen)

    def step() -> None:
        records = [engine.apply(update, 0) for update in stage.updates(0)]
        losses.append(next(value for key, value in records[0].items() if key.endswith("loss")))

    return step, losses


@pytest.mark.parametrize("name", ["ours", "diffusers", "diffusers, cuDNN"])
@pytest.mark.parametrize("stage", STAGES)
def bench_steps(benchmark, stage: str, name: str):
    cfg = load([*STAGES[stage], *WORDS])
    if name != "ours":
        imported("diffusers")
    with torch.device(DEVICE):
        net = build(CONFIG, 0)
    net = net if name == "ours" else Stock.of(net)
    gc.collect()
    try:
        step, losses = stepper(stage, cfg, net)
        step = with_cudnn(step) if name == "diffusers, cuDNN" else step
        step()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        samples = Samples([seconds(step) for _ in range(ROUNDS)])
    except torch.OutOfMemoryError:
        pytest.skip("the step does not fit this GPU's memory")
    LOSSES[stage, name] = losses[0]
    others = [loss for (s, n), loss in LOSSES.items() if s == stage and n != name]
    # bfloat16 keeps 8 bits of a number; a loss is the mean of many.
    assert all(math.isclose(losses[0], loss, rel_tol=0.02 if GPU else 1e-4) for loss in others), LOSSES
    columns = {"loss": losses[0]}
    if GPU:
        columns |= {"GB": torch.cuda.max_memory_allocated() / 1e9}
    if name == "ours" and GPU and (kind := kind_of(torch.device(DEVICE))):
        plan = budget(network(CONFIG, LATENT, TEXT), plan_of(cfg, 1, 1, kind), undropped(BLOCKS, 0.3))
        columns |= {"planned_GB": plan.peak / 1e9}
    kernels.record(benchmark, f"wan 1.3b {stage} step" if GPU else f"small {stage} step", name, samples, **columns)
