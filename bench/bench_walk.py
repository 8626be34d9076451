"""Time one walk against the same predictions made one by one, in one process, beside the bound from counting blocks.

A network has N blocks and keeps K; p is the first dropped block. The backward of a block counts as two forwards.
FLG_BENCH_BLOCKS=40 takes the large model's depth (minutes on a CPU).
"""

import copy
import itertools
import os
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from timing import seconds

from fastlightgen.config import load
from fastlightgen.data.source import Batch
from fastlightgen.models.base import Job, Stream
from fastlightgen.models.wan.model import WanConfig, WanModel
from fastlightgen.stages.distill import Distill
from fastlightgen.stages.networks import Networks
from fastlightgen.stages.sweep import score_sets

N = int(os.environ.get("FLG_BENCH_BLOCKS", 12))
DROPPED = [i for i in range(N) if 0.35 * N <= i < 0.65 * N]  # the middle, as in the paper's Fig. 4
KEEP = [i for i in range(N) if i not in DROPPED]
K, P = len(KEEP), DROPPED[0]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.timeout(3600)  # 40 blocks take minutes each on a CPU


@pytest.fixture(scope="module")
def world():
    """A network wide enough that matrix products dominate, and one batch."""
    cfg = WanConfig(num_attention_heads=8, attention_head_dim=64, ffn_dim=2048, num_layers=N, text_dim=64, freq_dim=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = WanModel(cfg).to(DEVICE)
    x_t, t, cond, null = net.example_inputs(1, size=(4, 16, 16))
    return SimpleNamespace(net=net, x_t=x_t, t=t, cond=cond, null=replace(null, image=cond.image))


def compare(benchmark, naive, shared, bound: float, rounds: int = 5) -> None:
    """Median of the ratios of neighbouring runs: a machine that gets slower then slows both sides."""
    naive(), shared()
    ratios = [seconds(naive) / seconds(shared) for _ in range(rounds)]
    benchmark.pedantic(shared, rounds=1)
    measured = statistics.median(ratios)
    benchmark.extra_info |= {"blocks": N, "measured": measured, "bound": bound, "measured/bound": measured / bound}
    print(f"\n{benchmark.name} ({N} blocks): {measured:.3f}x, bound {bound:.3f}x, quotient {measured / bound:.3f}")


@pytest.mark.benchmark(group="walk")
def bench_dual_forward(benchmark, world):
    w, both = world, [Stream(world.cond, KEEP), Stream(world.cond)]
    with torch.no_grad():
        compare(
            benchmark,
            lambda: (w.net(w.x_t, w.t, w.cond, KEEP), w.net(w.x_t, w.t, w.cond)),
            lambda: w.net.walk(w.x_t, w.t, both),
            (N + K) / (N + K - P),
        )


@pytest.mark.benchmark(group="walk")
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def bench_stage2_step(benchmark, world, alpha):
    """alpha 1: v_u is a target without gradient (Eq. 6); alpha 0.5: both paths carry gradient (Eq. 7)."""
    w, grad_u = world, alpha < 1

    def loss(v_p, v_u):
        total = alpha * (v_p - v_u.detach()).square().mean() + (1 - alpha) * (v_p.square().mean() + v_u.square().mean())
        total.backward()
        w.net.zero_grad()

    def naive():
        v_p = w.net(w.x_t, w.t, w.cond, KEEP)
        with torch.set_grad_enabled(grad_u):
            v_u = w.net(w.x_t, w.t, w.cond)
        loss(v_p, v_u)

    def shared():
        loss(*w.net.walk(w.x_t, w.t, [Stream(w.cond, KEEP, grad=True), Stream(w.cond, grad=grad_u)]))

    full = 3 if grad_u else 1  # cost of one block on the full path, in forwards
    alone = 3 * K + full * N
    # A walk computes the blocks before p once, with gradient in both cases.
    compare(benchmark, naive, shared, alone / (alone - full * P))


@pytest.mark.benchmark(group="walk")
def bench_teacher(benchmark, world):
    """v_p(c) and v_u(c) share the blocks before p; with v_p(null), all three share the first block's self-attention."""
    w, keys = world, {}
    null = replace(w.null, text=w.null.text[:1].expand_as(w.null.text))
    streams = [Stream(w.cond, KEEP), Stream(null, KEEP, text_keys=keys), Stream(w.cond)]
    with torch.no_grad():
        compare(
            benchmark,
            lambda: [w.net(w.x_t, w.t, s.cond, s.keep) for s in (streams[0], Stream(null, KEEP), streams[2])],
            lambda: w.net.walk(w.x_t, w.t, streams),
            (2 * K + N) / (2 * K + N - P - first_self_attention(w)),
        )


def first_self_attention(w) -> float:
    """Share of a block's FLOPs before text enters, and the cross-attention's query: 2 L D (5 D) + 4 L^2 D."""
    d, tokens = w.net.cfg.dim, w.x_t[0, 0].numel() // 4
    before = 10 * tokens * d * d + 4 * tokens**2 * d
    rest = 2 * tokens * d * d + 4 * tokens * d * w.net.cfg.ffn_dim + 4 * tokens * w.cond.text.shape[1] * d
    return before / (before + rest)


@pytest.mark.benchmark(group="walk")
def bench_stage3_cycle(benchmark, world):
    """Five critic updates, one student update (loss, backward); the teacher's predictions in one walk or in three."""

    class OneByOne(Networks):
        @torch.no_grad()
        def real(self, x_t, t, batch):
            return [self.teacher(x_t, t, c, k) for c, k in ((batch.cond, KEEP), (batch.null, KEEP), (batch.cond, None))]

    # The exit rungs of these five steps decide how long the rollouts are: count them instead of assuming the mean.
    (naive, forwards), (shared, fewer) = (cycles(world, kind, "fresh", 1) for kind in (OneByOne, Networks))
    compare(benchmark, naive, shared, forwards / (fewer - first_self_attention(world)), rounds=3)


@pytest.mark.benchmark(group="walk")
def bench_stage3_rollouts(benchmark, world):
    """Four cycles of five critic updates and one student update: fresh rollouts against one per cycle."""
    (fresh, forwards), (shared, fewer) = (cycles(world, Networks, kind, 4) for kind in ("fresh", "shared"))
    compare(benchmark, fresh, shared, forwards / fewer, rounds=3)


def cycles(w, kind: type[Networks], rollouts: str, count: int):
    """Return a function that runs the next `count` cycles of Stage III, and the block forwards that it took."""
    cfg = load(["stage=3", "run=unused", f"rollouts={rollouts}", "steps=4", "ratio=5", "count=outer"])
    student, fake = (copy.deepcopy(w.net).prune(KEEP) for _ in range(2))
    teacher = copy.deepcopy(w.net).requires_grad_(False)
    null = replace(w.null, text=w.null.text[:1].expand_as(w.null.text))
    batch = Batch(w.x_t, w.cond, null)
    stage = Distill(cfg, kind(student, teacher, KEEP, fake, None, fake, False, None), lambda step: batch, {})
    steps = 5 * count
    starts = itertools.count(0, steps) if rollouts == "shared" else itertools.repeat(0)

    def run() -> None:
        first = next(starts)  # a shared rollout is used up in the first step of the next cycle
        for step in range(first, first + steps):
            for update in stage.updates(step):
                update.loss()[0].backward()
        student.zero_grad(), fake.zero_grad()

    run()  # the first student's update needs a shared rollout of its own
    for net in (student, fake, teacher):
        net.block_calls = net.grad_block_calls = 0
    run()
    return run, sum(n.block_calls + 2 * n.grad_block_calls for n in (student, fake, teacher))


@pytest.mark.benchmark(group="walk")
def bench_stage1_sweep(benchmark, world):
    w = world
    skips = [[j for j in range(N) if j != i] for i in range(N)]
    sample = (w.x_t, w.t, w.x_t, w.cond)

    def naive():
        for keep in [*skips, None]:
            with torch.no_grad():
                w.net(w.x_t, w.t, w.cond, keep)

    def shared():
        table = torch.full((len(skips) + 1, len(w.t)), torch.nan)
        sweep = SimpleNamespace(table=table, tick=lambda scores: None, note=lambda: None)
        score_sets(w.net, [sample], [*skips, None], "elbo", 4.0, sweep)

    compare(benchmark, naive, shared, N * N / (N * (N + 1) / 2), rounds=3)


@pytest.mark.benchmark(group="walk")
def bench_one_stream_overhead(benchmark, world):
    """Time a walk of one stream against a plain loop over the same blocks."""
    w = world

    def plain():
        net = w.net
        tables = net.tables(w.x_t, w.t)
        prompt = net.prompt(w.cond, tables)
        state = net.embed(w.x_t, prompt)
        for block in net.blocks:
            keys = {prompt: block.read(prompt)}
            state = block.run(Job(state, [prompt], [False]), tables, keys)[0]
        return net.unembed(state, prompt, tables)

    with torch.no_grad():
        compare(benchmark, plain, lambda: w.net(w.x_t, w.t, w.cond), 1.0, rounds=15)
