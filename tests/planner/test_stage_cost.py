"""Planned costs of the stages against torch's counts: operations per step, bytes of the local engine's state."""

from dataclasses import replace

import pytest
import torch
from helpers import BLOCKS, KEPT, PRUNED, batches, config, counted, empty_sweep, small_wan

from fastlightgen.config import method_for, plan_for
from fastlightgen.engine.local import LocalEngine
from fastlightgen.models.families import network
from fastlightgen.models.lora import attach_lora
from fastlightgen.planner.memory import model_states
from fastlightgen.planner.step import StepCost, step_cost
from fastlightgen.stages.distill import Distill
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.prune import Prune
from fastlightgen.stages.sweep import score_sets
from fastlightgen.stages.teacher import Teacher


def one_batch():
    """Return a function step -> one fixed batch. Drawing clips in the step would add matrix products to the count."""
    batch = batches(2)(0)
    batch = replace(batch, null=replace(batch.null, image=batch.cond.image))  # the prompts of a clip share its image
    return lambda step: batch


def planned_for(stage) -> StepCost:
    """Return the planned cost of a step, from the walks that the stage's method declares."""
    net = stage.nets.teacher if hasattr(stage, "nets") else stage.net
    x0, cond = one_batch()(0).x0, one_batch()(0).cond
    cost = network(net.config, tuple(x0.shape[2:]), cond.text.shape[1])
    keep = stage.nets.keep if hasattr(stage, "nets") else KEPT
    return step_cost(cost, method_for(stage.cfg).walks(cost, keep, stage.cfg), stage.cfg)


@pytest.mark.parametrize(
    "words",
    [
        ["alpha=1", "target=self"],
        ["alpha=0.5", "target=self"],
        ["alpha=1", "target=frozen", "kappa_unpruned=0"],
        ["alpha=1", "target=frozen"],
        ["alpha=1", "target=frozen", "guided=2"],
        ["alpha=0.5", "target=ema", "checkpointing=true", "keep_attention=2"],
    ],
    ids=" ".join,
)
def test_operations_and_evaluations_of_a_stage_2_step(words):
    cfg, net = config(2, *words), small_wan()
    stage = Prune(cfg, net, PRUNED, one_batch(), lambda: batches(2)(9), {})
    net.checkpointing, net.keep_attention = cfg.checkpointing, cfg.keep_attention
    planned = planned_for(stage)
    nets = [net, *stage.frozen]
    for n in nets:
        n.block_calls = n.grad_block_calls = 0
    assert counted(lambda: stage.loss(0)[0].backward()) == 2 * planned.total("flops")
    assert sum(n.block_calls for n in nets) == planned.total("calls")
    assert sum(n.grad_block_calls for n in nets) == planned.total("grad_calls")


def distillation(*words: str, keep: list[int] = KEPT) -> Distill:
    cfg = config(3, *words)
    teacher, student, fake = small_wan().requires_grad_(False), small_wan().prune(keep), small_wan().prune(keep)
    original = small_wan(seed=1).requires_grad_(False) if cfg.strong == "original" else None
    fake_keep, trained = None, fake
    if cfg.fake_mode == "lora":
        fake, fake_keep = teacher, keep
        trained = attach_lora(teacher, cfg.lora_rank, torch.Generator())
    student.checkpointing = fake.checkpointing = cfg.checkpointing
    nets = Networks(student, teacher, keep, fake, fake_keep, trained, cfg.fake_mode == "lora", original)
    return Distill(cfg, nets, one_batch(), {})


@pytest.mark.parametrize(
    "words",
    [
        ["strong=stage2"],
        ["strong=original", "checkpointing=true"],
        ["guidance_times=below"],
        ["guidance_times=above", "strong=original"],
    ],
    ids=" ".join,
)
def test_operations_of_a_stage_3_iteration(words):
    stage = distillation("steps=1", "count=generator", "ratio=2", *words)
    planned = planned_for(stage)

    def student():
        stage.student_loss(0)[0].backward()

    student()  # computes the null prompt's keys and values, which are then reused
    nets = [n for n in (stage.nets.student, stage.nets.teacher, stage.nets.fake_net, stage.nets.original) if n]
    for n in nets:
        n.block_calls = n.grad_block_calls = 0
    ran = counted(student) + counted(lambda: [stage.critic_loss(c)[0].backward() for c in range(2)])
    assert ran == 2 * planned.total("flops")
    assert sum(n.block_calls for n in nets) == planned.total("calls")
    assert sum(n.grad_block_calls for n in nets) == planned.total("grad_calls")


def test_operations_of_low_rank_critics():
    stage = distillation("steps=1", "fake_mode=lora", "lora_rank=2")
    planned = planned_for(stage)
    adapters = sum(p.numel() for p in stage.nets.fake_trained.parameters())
    assert planned.trained["fake"] + planned.frozen["idle adapters"] == adapters
    critic = next(p.cost for p in planned.passes if p.net == "fake" and p.cost.grad_calls)
    student = next(p.cost for p in planned.passes if p.net == "student" and not p.cost.grad_calls)
    ran = counted(lambda: stage.critic_loss(0)[0].backward())
    # The plan is off in two ways: it counts a gradient of the first block's input, 3 of some 140 products here, and it
    # spreads the adapters evenly over image and text tokens.
    assert ran == pytest.approx(2 * (critic.flops + student.flops), rel=0.03)


def evaluations(stage, steps: range) -> tuple[int, int]:
    """Run the updates of some iterations without optimizer; return block evaluations, and those with gradient."""
    nets = [n for n in (stage.nets.student, stage.nets.teacher, stage.nets.fake_net, stage.nets.original) if n]
    for n in nets:
        n.block_calls = n.grad_block_calls = 0
    for step in steps:
        for update in stage.updates(step):
            update.loss()[0].backward()
    return sum(n.block_calls for n in nets), sum(n.grad_block_calls for n in nets)


@pytest.mark.parametrize("rollouts", ["fresh", "shared"])
@pytest.mark.parametrize(
    "words", [[], ["steps=3", "ratio=2"], ["count=generator", "ratio=2"], ["rollout=data"]], ids=" ".join
)
def test_block_evaluations_of_rollouts(words, rollouts):
    """Over `steps` cycles of updates, both networks leave the ladder equally often at each rung."""
    stage = distillation(*words, f"rollouts={rollouts}")
    planned = planned_for(stage)
    cycle = stage.cfg.ratio if stage.cfg.count == "outer" else 1
    if rollouts == "shared":
        evaluations(stage, range(cycle))  # the student's first update needs a walk of its own
    first = cycle if rollouts == "shared" else 0
    steps = range(first, first + stage.cfg.steps * cycle)
    calls, grad_calls = evaluations(stage, steps)
    assert calls == pytest.approx(len(steps) * planned.total("calls"), rel=1e-12)
    assert grad_calls == pytest.approx(len(steps) * planned.total("grad_calls"), rel=1e-12)


@pytest.mark.parametrize("count", ["outer", "generator"])
@pytest.mark.parametrize("rollouts", ["fresh", "shared"])
def test_block_evaluations_of_a_run_with_a_critic_only_start(rollouts, count):
    """12 critic updates alone, then 6 cycles of 2; the ladder has 2 rungs."""
    iters = 24 if count == "outer" else 12
    words = ["steps=2", "ratio=2", "critic_start=12", f"iters={iters}"]
    stage = distillation(*words, f"count={count}", f"rollouts={rollouts}")
    planned = planned_for(stage)
    calls, grad_calls = evaluations(stage, range(iters))
    assert calls == pytest.approx(iters * planned.total("calls"), rel=1e-12)
    assert grad_calls == pytest.approx(iters * planned.total("grad_calls"), rel=1e-12)


@pytest.mark.parametrize("keep", [[0, 3], [0, 1], [0, 1, 2]], ids=str)
def test_a_cycle_takes_26_k_block_forwards_instead_of_36_k(keep):
    """Ladder of n rungs, r critic updates, K of N blocks kept, p the first dropped; a backward counts as 2 forwards.

    Student: (n - 1) / 2 + 3 K for its update (half the ladder before its exit, then a step with gradient), (n + 1) / 2
    K for each of the critic's. Critic: K in the student's update, 3 K in each of its own. Teacher: 2 K + N - p.
    Shared: the student walks n K once and 3 K with gradient. With N - p = K the sums are 36 K and 26 K.
    """
    n, r, blocks, kept = 4, 5, BLOCKS, len(keep)
    p = next(i for i in range(blocks) if i not in keep)
    teacher = 2 * kept + blocks - p
    wanted = {
        "fresh": ((n - 1) / 2 + 3 + r * (n + 1) / 2 + 1 + 3 * r) * kept + teacher,
        "shared": (n + 3 + 1 + 3 * r) * kept + teacher,
    }
    if keep == [0, 1]:  # N - p = K
        assert wanted == {"fresh": 36 * kept, "shared": 26 * kept}
    for rollouts, forwards in wanted.items():
        stage = distillation(f"ratio={r}", f"rollouts={rollouts}", keep=keep)
        planned = planned_for(stage)
        assert r * (planned.total("calls") + 2 * planned.total("grad_calls")) == pytest.approx(forwards, rel=1e-12)
        if rollouts == "shared":
            evaluations(stage, range(r))  # the student's first update needs a walk of its own
        # Fresh rollouts have their mean length over n cycles.
        cycles, first = (1, r) if rollouts == "shared" else (n, 0)
        calls, grad_calls = evaluations(stage, range(first, first + cycles * r))
        assert calls + 2 * grad_calls == cycles * forwards


def test_operations_and_evaluations_of_the_sweep():
    net, cfg = small_wan(), config(1, "batch=2")
    x_t, t, cond, _ = net.example_inputs(2, size=(2, 4, 4))
    cost = network(net.config, (2, 4, 4), cond.text.shape[1])
    planned = step_cost(cost, method_for(cfg).walks(cost, KEPT, cfg), cfg)
    keeps = [[j for j in range(BLOCKS) if j != i] for i in range(BLOCKS)] + [None]
    net.block_calls = 0
    sweep = empty_sweep(len(keeps), 2)
    ran = counted(lambda: score_sets(net, [(x_t, t, x_t, cond)], keeps, "elbo", cfg.memory, sweep))
    assert ran == 2 * planned.total("flops")
    assert net.block_calls == planned.total("calls") == BLOCKS * (BLOCKS + 1) // 2


def state_bytes(stage, engine: LocalEngine) -> tuple[int, int, int]:
    """Return the bytes of the weights, of the largest gradients and of AdamW's two moments."""
    tensors = {id(p): p for role in stage.roles.values() for p in role.net.parameters()}
    for net in (*stage.frozen, *vars(getattr(stage, "nets", stage)).values()):
        if isinstance(net, torch.nn.Module):
            tensors |= {id(p): p for p in net.parameters()}
    gradients = 0
    for update in stage.updates(0):
        update.loss()[0].backward()
        params = engine.optimizers[update.role].param_groups[0]["params"]
        gradients = max(gradients, sum(p.grad.nbytes for p in tensors.values() if p.grad is not None))
        engine.optimizers[update.role].step()
        for p in params:
            p.grad = None
    states = [s for o in engine.optimizers.values() for s in o.state.values()]
    moments = sum(s[k].nbytes for s in states for k in ("exp_avg", "exp_avg_sq"))
    return sum(p.nbytes for p in tensors.values()), gradients, moments


@pytest.mark.parametrize("case", ["teacher", "prune", "prune still", "distill", "distill lora"])
def test_model_states_of_the_local_engine_to_the_byte(case):
    if case == "teacher":
        stage = Teacher(config(0), small_wan(), batches(2), {})
        planned = planned_for(stage)
    elif case.startswith("prune"):
        cfg = config(2, *(["kappa_unpruned=0"] if case == "prune still" else []))
        stage = Prune(cfg, small_wan(), PRUNED, one_batch(), lambda: batches(2)(9), {})
        planned = planned_for(stage)
    else:
        stage = distillation(*(["fake_mode=lora"] if case == "distill lora" else []))
        planned = planned_for(stage)
    engine = LocalEngine(torch.device("cpu"), "float32")
    engine.prepare(stage)
    states = model_states(planned, plan_for(stage.cfg, gpus=1))
    assert tuple(states.values()) == state_bytes(stage, engine)
