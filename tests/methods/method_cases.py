"""Helpers for tests of the rivals: model folders of very small networks, stages built from them, planned costs."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import KEPT, batches, counted, small_hunyuan, small_wan, write_ranking
from torch import Tensor

from fastlightgen.config import load, method_for
from fastlightgen.data.source import Batch
from fastlightgen.models.base import Job, VideoDiT
from fastlightgen.models.families import network
from fastlightgen.models.folder.weights import save_model
from fastlightgen.planner.step import StepCost, step_cost
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.build import Builder
from fastlightgen.stages.discriminator import read_blocks

CPU = torch.device("cpu")
OWN = 2.0  # the teacher's own guidance, in its card
TEACHER, STAGE2 = 2, 1  # the seeds of the networks' weights
COMMON = ["stage=3", "run=unused", "batch=2", "shift=3", "progress=false"]


class Source:
    """Cropped clips of the built-in world."""

    name, description = "test", {}

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def batch(self, step: int, size: int, rows=None) -> Batch:
        batch = batches(size, self.dtype)(step)
        return replace(batch, null=replace(batch.null, image=batch.cond.image))  # a clip's prompts share its image


def write_models(root: Path, make=small_wan, keep=KEPT) -> list[str]:
    """Write a teacher and a Stage II model; return the words that name them."""
    save_model(make(seed=TEACHER), root / "teacher", guidance=OWN, shift=3.0)
    save_model(make(seed=STAGE2), root / "stage2", pruned_path=list(keep), guidance=1.0, shift=3.0)
    return [f"model={root / 'teacher'}", f"stage2_model={root / 'stage2'}"]


def write_hunyuan(root: Path) -> list[str]:
    return write_models(root, small_hunyuan, [0, 2, 3])  # of 2 double and 3 single blocks


def ranked_models(root: Path, make: Callable[[Path], list[str]], pruned: list[int], blocks: int) -> list[str]:
    """Words that name a teacher and Stage I's ranking."""
    teacher = next(w for w in make(root) if w.startswith("model="))
    return [teacher, f"importance={write_ranking(root / 'importance.json', pruned, blocks)}"]


def crash_after(patch: pytest.MonkeyPatch, updates: int) -> None:
    """Let the optimizers of a run take `updates` steps; the next one finds no memory."""
    step, calls = torch.optim.AdamW.step, []

    def crash(*args, **keys):
        calls.append(1)
        if len(calls) > updates:
            raise MemoryError
        return step(*args, **keys)

    patch.setattr(torch.optim.AdamW, "step", crash)


def configured(*words: str):
    """The configuration of a method; a later word replaces an earlier one with the same key."""
    given = dict(w.split("=", 1) for w in (*COMMON, *words))
    if given.get("student") == "full":
        given.pop("stage2_model", None)
    return load([f"{k}={v}" for k, v in given.items()])


def built(*words: str, dtype: torch.dtype = torch.float64):
    """Build a stage as the train command does, with networks of this type."""
    cfg = configured(*words)
    stage = method_for(cfg).build(cfg, Builder(cfg, Source(dtype), CPU))
    for net in networks(stage):
        net.to(dtype)
    return stage


def networks(stage) -> list[VideoDiT]:
    """All networks of a stage."""
    roles = list(stage.roles.values())
    found = [*(r.network for r in roles), *(r.carried for r in roles if r.carried is not None), *stage.frozen]
    return list({id(net): net for net in found}.values())


def moved(module: torch.nn.Module, by: float = 0.05, seed: int = 1) -> None:
    """Move all parameters of a module a little, so that no two networks are equal."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += by * torch.randn(p.shape, generator=gen, dtype=p.dtype)


def fixed(stage) -> Batch:
    """Give a stage the same batch at every step: drawing clips in a step would add matrix products to its count.

    Its texts have their full length, as the planner takes them to have.
    """
    owner = getattr(stage, "rollouts", stage)
    batch = owner.batches(0)
    batch = replace(batch, cond=replace(batch.cond, text_len=None), null=replace(batch.null, text_len=None))
    owner.batches = lambda step: batch
    return batch


def planned(stage, keep=KEPT) -> StepCost:
    """The planned cost of an iteration for one clip, from the walks that the method declares."""
    batch = fixed(stage)
    net = network(stage.teacher.config, tuple(batch.x0.shape[2:]), batch.cond.text.shape[1], fused=False)
    return step_cost(net, method_for(stage.cfg).walks(net, keep, stage.cfg), stage.cfg)


def compare_with_plan(stage, keep=KEPT, tolerance: float = 0) -> StepCost:
    """Assert that an iteration has the planned operations, block evaluations (of clips) and trained parameters.

    It must be an iteration with an update of every role, and a ladder of one step. Return the plan.
    """
    cost, ran = planned(stage, keep), Counter()

    def iteration() -> None:
        for update in stage.updates(0):
            update.loss()[0].backward()

    def note(net, args, out) -> None:  # a walk may have the clips of two batches
        ran["calls"] += net.block_calls * len(args[0]) // 2
        ran["grad_calls"] += net.grad_block_calls * len(args[0]) // 2
        net.block_calls = net.grad_block_calls = 0

    iteration()  # computes the null prompt's keys and values, which are then reused
    for net in networks(stage):
        net.block_calls = net.grad_block_calls = 0
        net.register_forward_hook(note)
    assert counted(iteration) == pytest.approx(2 * cost.total("flops"), rel=tolerance, abs=0)
    assert ran["calls"] == cost.total("calls") and ran["grad_calls"] == cost.total("grad_calls")
    for name, role in stage.roles.items():
        assert cost.trained[name] == sum(p.numel() for p in role.net.parameters())
    held = {id(p): p.numel() for net in networks(stage) for p in net.parameters()}
    assert sum(cost.trained.values()) + sum(cost.frozen.values()) == sum(held.values())
    return cost


def without_gradient(*modules: torch.nn.Module) -> bool:
    return all(p.grad is None for module in modules for p in module.parameters())


def with_gradient(module: torch.nn.Module) -> bool:
    return all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


# The formulas that the methods with a critic share, written out for Wan.


def hidden_states(net: VideoDiT, x_t: Tensor, t: Tensor, cond) -> tuple[Tensor, list[Tensor]]:
    """The prediction of a Wan network, and the hidden states after each block, block by block."""
    tables = net.tables(x_t, t)
    prompt = net.prompt(cond, tables)
    state, hidden = net.embed(x_t, prompt), []
    for block in net.blocks:
        ((state,),) = block([Job(state, [prompt], [True])], tables)
        hidden.append(state.x + state.y * state.gate[:, None])
    return net.unembed(state, prompt, tables), hidden


def judged(net: VideoDiT, x_t: Tensor, t: Tensor, cond) -> tuple[Tensor, Tensor]:
    """The critic's prediction and the logits of its heads, written out."""
    v, hidden = hidden_states(net, x_t, t, cond)
    logits = []
    for block, head in zip(read_blocks(net.num_blocks, 3), net.discriminator.heads):
        h = hidden[block]
        h = (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        h = (h * head.norm.weight + head.norm.bias) @ head.token.weight.T + head.token.bias
        h = (h * torch.sigmoid(h)).mean(1)
        logits.append((h @ head.out.weight.T + head.out.bias)[:, 0])
    return v, torch.stack(logits)


def clips(stage, purpose: int, number: int, batch, walk=None):
    """The student's clips of an update and its generator after the draws, by hand: rungs in cycles, from noise.

    `walk`: the generator of a shared rollout.
    """
    cfg, student = stage.cfg, stage.student
    gen = generator(0, purpose, 2 * number if purpose == 5 else number)
    draws = walk or gen
    order = torch.randperm(cfg.steps, generator=generator(0, 12, purpose, number // cfg.steps)).tolist()
    rung = order[number % cfg.steps]
    tau = [3 * u / (1 + 2 * u) for u in (1 - i / cfg.steps for i in range(cfg.steps))]
    x = normal_like(batch.x0, draws)
    if cfg.rollout == "data":
        x = (1 - tau[rung]) * batch.x0 + tau[rung] * x
    for i in range(rung if cfg.rollout == "simulate" else 0):
        v = student(x, tau[i], batch.cond).detach()
        x = (1 - tau[i + 1]) * (x - tau[i] * v) + tau[i + 1] * normal_like(x, draws)
    return x - tau[rung] * student(x, tau[rung], batch.cond), gen


def times(gen) -> Tensor:
    u = torch.rand(2, generator=gen).clamp(1e-4, 1)
    return (3 * u / (1 + 2 * u)).clamp(0.02, 0.98).double()


def noised(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    at = t.view(-1, 1, 1, 1, 1)
    return (1 - at) * x + at * noise
