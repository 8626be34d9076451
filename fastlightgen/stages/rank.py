"""Stage I: rank the blocks by the x0 error that skipping each one causes (Tweedie, Eq. 2 to 4).

Stage I takes no optimizer step: it is one sweep over a fixed set of clips and times. So it does not run in the training
loop, which exists to accumulate, clip, step and save. It only lets the engine place the network.

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B]; errors [clips x timesteps].
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen import flow
from fastlightgen.config import BatchKeys, ConfigError, Run, field
from fastlightgen.data.source import Batch
from fastlightgen.engine.guard import held_out_mean
from fastlightgen.engine.shards import shape
from fastlightgen.models.base import Cond, Stream, VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import read_card
from fastlightgen.parallel import ranks
from fastlightgen.planner.step import Iteration, Net, Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.build import Builder
from fastlightgen.stages.method import Guess, Method, Subject
from fastlightgen.stages.scores import BLOCK_SCORES, Sample, evaluation_set, output_mse, x0_error
from fastlightgen.stages.search import SEARCHES, counts_of, lists_of, without

HELD_OUT = 4  # the purpose of this file's random draws


class Sweep(Protocol):
    """The errors [block sets, samples] of one sweep: NaN where they are not known yet; float32, on the CPU."""

    table: Tensor

    def tick(self, scores: int) -> object:
        """Called during a walk: so many more scores are nearly known."""

    def note(self) -> None:
        """Called on all ranks after every walk: `table` holds its errors now. May end the run after a signal."""


Sweeps = Callable[[int, int, str], AbstractContextManager[Sweep]]  # (block sets, samples, title) -> the next sweep


@dataclass(kw_only=True)
class RankKeys(BatchKeys):
    """Keys of Stage I."""

    batch: int = field(16, "clips per network call", lo=1, everyday=True)
    ratio: float = field(0.3, "share of the network to drop", above=0, below=1, everyday=True)
    ratio_unit: str = field("blocks", "what `ratio` counts", choices=("blocks", "params", "flops"))
    units: str = field(
        "all",
        "the blocks that may be dropped, and that `ratio` counts; all; for networks with several lists of blocks also: "
        "the name of a list (HunyuanVideo: double, single), or per_list (the ratio of each list)",
    )
    search: str = field(
        "single_skip",
        "single_skip: each block alone; iterative: least harmful first, then again; exhaustive: all subsets (tests)",
        choices=("single_skip", "iterative", "exhaustive"),
        everyday=True,
    )
    score: str = field(
        "elbo",
        "elbo: error against the data; output_mse: change of v; l2: sum of squared weights; taylor: |sum of w dL/dw|",
        choices=("elbo", "output_mse", *BLOCK_SCORES),
    )
    clips: int = field(64, "clips of the evaluation set", lo=1, everyday=True)
    timesteps: int = field(8, "stratified times per clip", lo=1, everyday=True)
    t_range: list[float] = field([0.02, 0.98], "range of the times before the shift", lo=0, hi=1)
    protect_first: int = field(0, "blocks at the start that are never dropped", lo=0)
    protect_last: int = field(0, "blocks at the end that are never dropped", lo=0)
    memory: float = field(
        4.0, "GB for the hidden states of candidates that are walked together", above=0, numbers=False
    )

    def check(self) -> None:
        super().check()
        self.check_ordered("t_range")
        if self.score in BLOCK_SCORES and self.search != "single_skip":
            raise ConfigError(
                f"score={self.score}: scores single blocks, search={self.search} needs scores of sets of blocks; "
                "use search=single_skip"
            )


class Config(RankKeys, Run):
    """A configuration of this stage: its own keys and those of every stage."""


def denoising_error(
    net: VideoDiT, keep: Sequence[int] | None, x0: Tensor, t: Tensor, noise: Tensor, cond: Cond
) -> Tensor:
    """Eq. 4 per sample, for a network that runs the blocks `keep`."""
    x_t = flow.add_noise(x0, noise, t)
    return x0_error(net(x_t, t, cond, keep), x_t, t, x0)


def held_out_error(net: VideoDiT, batch: Batch, cfg: Any, keep: Sequence[int] | None = None) -> float:
    """The mean of Eq. 4 over held-out clips, as many at a time as in training, for memory."""
    times = flow.shift_time(torch.linspace(0.02, 0.98, len(batch.x0)), cfg.shift)
    noise = normal_like(batch.x0, generator(cfg.seed, HELD_OUT))
    measure = partial(denoising_error, net, keep)
    at_once = cfg.micro_batch or max(1, cfg.batch // ranks.shares(cfg.sequence_parallel)[1])
    clips = batch.x0, times, noise
    return held_out_mean(measure, clips, batch.cond, net.device, at_once, cfg.sequence_parallel)


@torch.no_grad()
def score_sets(
    model: VideoDiT,
    samples: Sequence[Sample],
    keeps: Sequence[Sequence[int] | None],
    kind: str,
    memory: float,
    sweep: Sweep,
) -> Tensor:
    """Return the errors [block sets, samples] of the block sets `keeps`, from walks that share prefixes.

    All single skips and the full pass take N (N + 1) / 2 block evaluations instead of N^2. A walk holds two hidden
    tensors per block set, so they are walked in groups of at most `memory` GB. The ranks divide the samples. What the
    sweep knows already is not measured again; it learns the new errors after every walk.
    """
    together = model.sequence.size if model.sequence else 1  # ranks that share a clip's tokens
    _, groups = ranks.shares(together)
    offsets = [0, *accumulate(len(t) for _, t, _, _ in samples)]
    table = sweep.table
    for turn, (index, reports) in enumerate(ranks.turns(len(samples), together)):
        x_t, t, x0, cond = samples[index]
        own = slice(offsets[index], offsets[index + 1])
        # The samples of this turn, of all ranks: every rank walks the same block sets, for the sake of sharded weights.
        first, last = turn * groups, min((turn + 1) * groups, len(samples))
        columns = slice(offsets[first], offsets[last])
        left = table[:, columns].isnan().any(1).nonzero().flatten().tolist()
        size = max(1, int(memory * 1e9 * together / (2 * model.hidden_bytes(x_t))))
        v_full = None
        for start in range(0, len(left), size):
            group = left[start : start + size]
            whole = kind == "output_mse" and v_full is None  # the full pass joins the first group
            streams = [Stream(cond)] * whole + [Stream(cond, keeps[row]) for row in group]
            with ticking(model, len(group) * (offsets[last] - offsets[first]), sweep.tick):
                out = model.walk(x_t, t, streams)
            if whole:
                v_full = out.pop(0)
            found = table.new_zeros(len(group), table.shape[1])
            if reports:
                errors = [x0_error(v, x_t, t, x0) if v_full is None else output_mse(v, v_full) for v in out]
                found[:, own] = torch.stack(errors).cpu()
            table[group, columns] = ranks.summed(found)[:, columns]
            sweep.note()
    return table


@contextmanager
def ticking(model: VideoDiT, scores: int, tick: Callable[[int], object]) -> Iterator[None]:
    """During one walk, tick `scores` in all, a part after each block: a walk of a large model takes minutes."""
    ends = [scores * (i + 1) // model.num_blocks for i in range(model.num_blocks)]
    parts = (end - start for start, end in pairwise([0, *ends]))

    def after(*_: Any) -> None:
        tick(next(parts, 0))

    hooks = [block.register_forward_hook(after) for block in model.blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    tick(sum(parts))  # blocks that no stream ran


def rank(
    cfg: Config, model: VideoDiT, batches: Callable[[int], Batch], costs: Sequence[float], sweeps: Sweeps
) -> dict[str, Any]:
    """Return the contents of importance.json: scores, kept and pruned blocks, and how they were measured."""
    n, units = model.num_blocks, model.units()
    lists = lists_of(units, cfg.units)
    free = [[i for i in blocks if cfg.protect_first <= i < n - cfg.protect_last] for blocks in lists]
    for left, blocks in zip(free, lists, strict=True):
        if len(left) < 2:
            raise ValueError(
                f"protect_first, protect_last: leave {len(left)} of {len(blocks)} blocks to choose from; "
                "at least 2 are needed"
            )
    samples = list(evaluation_set(cfg, batches))

    def scores(keeps: Sequence[Sequence[int] | None], title: str) -> Tensor:
        with sweeps(len(keeps), sum(len(t) for _, t, _, _ in samples), title) as sweep:
            return score_sets(model, samples, keeps, cfg.score, cfg.memory, sweep)

    # Single skips: the paper's ranking, and the start of the other searches.
    direct = BLOCK_SCORES.get(cfg.score)
    if direct is None:
        table = scores([without(n, i) for i in range(n)] + [None], "stage 1: skip each block")
        single, base = table[:-1], table[-1]
    else:
        single, base = direct(model, samples)[:, None], torch.zeros(1)
    mean = single.mean(1).tolist()
    counts = counts_of(cfg, free, lists, costs, mean)
    pruned = SEARCHES[cfg.search](n, free, counts, mean, scores)
    keep = without(n, *pruned)
    together = scores([keep], "stage 1: all of them dropped")[0] if direct is None else single[pruned].sum()
    return {
        "units": [u | {"score": single[i].mean().item(), "stderr": stderr(single[i])} for i, u in enumerate(units)],
        "baseline_score": base.mean().item(),
        "baseline_stderr": stderr(base),
        "pruned_score": together.mean().item(),
        # most important block first; the block to drop first is last
        "ranking": sorted(keep, key=lambda i: -mean[i]) + pruned[::-1],
        "kept": keep,
        "pruned": sorted(pruned),
        "pruning_ratio": len(pruned) / n,
        "prefix": min(pruned),
        "search": cfg.search,
        "score_kind": cfg.score,
        "num_samples": sum(len(t) for _, t, _, _ in samples),
        "seed": cfg.seed,
    }


def stderr(x: Tensor) -> float:
    """Return the standard error of the mean; 0 for a single number."""
    return (x.std() / x.numel() ** 0.5).item() if x.numel() > 1 else 0.0


def build(cfg: Config, with_: Builder) -> tuple[VideoDiT, list[float]]:
    """Return the model and the cost of each of its blocks, in the unit of `ratio`."""
    folder = trained_folder(cfg.model)
    if cfg.score == "taylor" and cfg.engine == "deepspeed" and (cfg.zero == 3 or cfg.sequence_parallel > 1):
        raise ValueError("score=taylor: needs gradients of whole weights; use zero=1 or 2 and sequence_parallel=1")
    model = with_.load(folder).requires_grad_(False)
    with_.check_data(model, read_card(folder))
    costs = [1.0] * model.num_blocks
    if cfg.ratio_unit == "params":
        costs = [float(sum(shape(p).numel() for p in b.parameters())) for b in model.blocks]
    elif cfg.ratio_unit == "flops":
        batch = with_.source.batch(0, 1)
        costs = [float(f) for f in model.block_flops(batch.x0, batch.cond)]
    return model, costs


def walks(net: Network, keep: Sequence[int], cfg: Config) -> Iteration:
    """Count one batch of clips at one time: all single skips and the full pass, in groups of `memory` GiB."""
    n, clips = len(net.blocks), min(cfg.batch, cfg.clips)
    count = math.ceil(cfg.clips / clips) * cfg.timesteps
    if cfg.score in BLOCK_SCORES:
        own = [Walk("model", [Route(grad=True)])] if cfg.score == "taylor" else []
        return Iteration({"model": Net()}, own, clips=clips, count=count)
    size = 4 if cfg.dtype == "float32" else 2  # bytes of a number
    group = max(1, int(cfg.memory * 1e9 / (2 * clips * net.hidden * size)))
    routes = [Route(keep=without(n, i)) for i in range(n)] + [Route()]
    sweep = [Walk("model", routes[i : i + group]) for i in range(0, n + 1, group)]
    return Iteration({"model": Net()}, sweep, clips=clips, count=count)


def subject(cfg: Config, guess: Guess | None = None) -> Subject:
    return config_of(trained_folder(cfg.model)), ()


METHOD = Method(
    stage="1",
    name="fastlightgen",
    title="Ranking",
    about="the x0 error that each block's absence causes",
    keys=RankKeys,
    build=build,
    walks=walks,
    subject=subject,
    savings=({"memory": 0.25},),
)
