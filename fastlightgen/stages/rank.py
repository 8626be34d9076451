"""Stage I: rank the blocks by the x0 error that skipping each one causes (Tweedie, Eq. 2 to 4).

Stage I takes no optimizer step: it is one sweep over a fixed set of clips and times. So it does not run in the training
loop, which exists to accumulate, clip, step and save. It only lets the engine place the network. search=calibrated
trains after the sweep, with runs of Stage II (recovery.py).

Shapes: x0, noise, x_t, v [B, C, F, H, W]; t [B]; errors [clips x timesteps].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlightgen.config import BatchKeys, ConfigError, Run, field, words
from fastlightgen.config.limits import MOST_CLIPS
from fastlightgen.config.run import GUIDANCE
from fastlightgen.data.source import Batch
from fastlightgen.engine.shards import shape
from fastlightgen.metrics.latent import latent_features
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.folder.networks import config_of, trained_folder
from fastlightgen.models.folder.weights import read_card
from fastlightgen.planner.step import Iteration, Net, Walk, dropped
from fastlightgen.planner.walk import Route
from fastlightgen.stages import generated
from fastlightgen.stages.attention import attention_mass
from fastlightgen.stages.build import Builder
from fastlightgen.stages.method import Guess, Method, Subject
from fastlightgen.stages.recovery import SHORT, recovery_keys
from fastlightgen.stages.scores import Sample, evaluation_set, l2, taylor
from fastlightgen.stages.search import SEARCHES, candidates, counts_of, dropping, lists_of, swaps, without
from fastlightgen.stages.sweep import Keeps, Sweeps, score_sets

# Scores of single blocks, which say nothing of sets of blocks; the others are those of networks that skip a set.
BLOCK_SCORES: dict[str, Callable[[Any, VideoDiT, Sequence[Sample]], Tensor]] = {
    "l2": lambda cfg, net, samples: l2(net),
    "taylor": lambda cfg, net, samples: taylor(net, samples),
    "attention_mass": lambda cfg, net, samples: attention_mass(cfg, net, samples, "score=attention_mass").mean(1),
}

MOST_SAMPLES = 100_000  # clips times timesteps: all of them stay in memory


@dataclass(kw_only=True)
class RankKeys(BatchKeys):
    """Keys of Stage I."""

    batch: int = field(16, "clips per network call", lo=1, hi=MOST_CLIPS, everyday=True)
    ratio: float = field(0.3, "share of the network to drop", above=0, below=1, everyday=True)
    ratio_unit: str = field("blocks", "what `ratio` counts", choices=("blocks", "params", "flops"))
    units: str = field(
        "all",
        "the blocks that may be dropped, and that `ratio` counts; all; for networks with several lists of blocks also: "
        "the name of a list (HunyuanVideo: double, single), or per_list (the ratio of each list)",
    )
    search: str = field(
        "single_skip",
        "single_skip: each block alone; iterative: least harmful first, then again; exhaustive: all subsets (tests); "
        "calibrated: a short Stage II for each of the best few sets, then the best",
        choices=(*SEARCHES, "calibrated"),
        everyday=True,
    )
    score: str = field(
        "elbo",
        "elbo: error against the data; output_mse: change of v; frechet: distance of generated clips to real ones; of "
        "single blocks: l2: sum of squared weights; taylor: |sum of w dL/dw|; attention_mass: attention between frames",
        choices=("elbo", "output_mse", "frechet", *BLOCK_SCORES),
    )
    clips: int = field(64, "clips of the evaluation set", lo=1, hi=MOST_CLIPS, everyday=True)
    timesteps: int = field(8, "stratified times per clip", lo=1, hi=1_000, everyday=True)
    t_range: list[float] = field([0.02, 0.98], "range of the times before the shift", lo=0, hi=1)
    queries: int = field(
        256, "score=attention_mass: tokens per clip and time whose attention is measured", lo=1, hi=1_000_000
    )
    score_steps: int = field(8, "score=frechet: sampling steps of a clip", lo=1, hi=1_000)
    score_guidance: float = field(-1.0, f"score=frechet: {GUIDANCE}")
    candidates: int = field(4, "search=calibrated: sets of blocks that are recovered", lo=2, hi=1_000)
    recovery: str = field(
        "", f"search=calibrated: keys of the short Stage II, with commas, on top of {','.join(words(SHORT))}"
    )
    protect_first: int = field(0, "blocks at the start that are never dropped", lo=0)
    protect_last: int = field(0, "blocks at the end that are never dropped", lo=0)
    memory: float = field(
        4.0, "GB for the hidden states of candidates that are walked together", above=0, numbers=False
    )

    def check(self) -> None:
        super().check()
        self.check_ordered("t_range")
        if self.score in BLOCK_SCORES and self.search not in ("single_skip", "calibrated"):
            raise ConfigError(
                f"score={self.score}: scores single blocks, search={self.search} needs scores of sets of blocks; "
                "use search=single_skip or calibrated"
            )
        if self.score == "frechet" and self.clips < generated.FEWEST:
            raise ConfigError(f"clips={self.clips}: score=frechet needs {generated.FEWEST} or more")
        if self.recovery and self.search != "calibrated":
            raise ConfigError(f"recovery={self.recovery}: belongs to search=calibrated, not search={self.search}")
        if self.search == "calibrated":
            recovery_keys(self.recovery)


class Config(RankKeys, Run):
    """A configuration of this stage: its own keys and those of every stage."""


def rank(
    cfg: Config,
    model: VideoDiT,
    batches: Callable[[int], Batch],
    costs: Sequence[float],
    sweeps: Sweeps,
    measure: generated.Measure = latent_features,
) -> dict[str, Any]:
    """Return the contents of importance.json: scores, kept and pruned blocks, and how they were measured.

    `measure` gives the features of clips for score=frechet. With search=calibrated the choice is not yet made: the
    sets stand in "candidates", and the dropped blocks are those of the first one.
    """
    n, units = model.num_blocks, model.units()
    lists = lists_of(units, cfg.units)
    free = [[i for i in blocks if cfg.protect_first <= i < n - cfg.protect_last] for blocks in lists]
    for left, blocks in zip(free, lists, strict=True):
        if len(left) < 2:
            raise ValueError(
                f"protect_first, protect_last: leave {len(left)} of {len(blocks)} blocks to choose from; "
                "at least 2 are needed"
            )
    direct = BLOCK_SCORES.get(cfg.score)
    samples = list(evaluation_set(cfg, batches)) if cfg.score != "frechet" else []
    clips = generated.Generated(cfg, model, batches, measure) if cfg.score == "frechet" else None
    count = cfg.clips * (1 if clips else cfg.timesteps)

    def scores(keeps: Keeps, title: str) -> Tensor:
        if clips:
            return clips.scores(keeps, title, sweeps)
        with sweeps(len(keeps), count, title) as sweep:
            return score_sets(model, samples, keeps, cfg.score, cfg.memory, sweep)

    # Single skips: the paper's ranking, and the start of the other searches.
    if direct is None:
        table = scores([without(n, i) for i in range(n)] + [None], "stage 1: skip each block")
        single, base = table[:-1], table[-1]
    else:
        single, base = direct(cfg, model, samples)[:, None], torch.zeros(1)
    mean = single.mean(1).tolist()
    counts = counts_of(cfg, free, lists, costs, mean)
    record: dict[str, Any] = {
        "units": [u | {"score": single[i].mean().item(), "stderr": stderr(single[i])} for i, u in enumerate(units)],
        "baseline_score": base.mean().item(),
        "baseline_stderr": stderr(base),
        "search": cfg.search,
        "score_kind": cfg.score,
        "num_samples": count,
        "seed": cfg.seed,
    }
    if cfg.search == "calibrated":
        sets = None if direct else scores
        found = candidates(cfg.candidates, n, free, counts, mean, sets, greedy(cfg))
        first = sorted(found[0]["pruned"], key=mean.__getitem__)
        return record | dropping(mean, first) | {"pruned_score": found[0]["score"], "candidates": found}
    pruned = SEARCHES[cfg.search](n, free, counts, mean, scores)
    keep = without(n, *pruned)
    together = single[pruned].sum() if direct else scores([keep], "stage 1: all of them dropped")[0]
    return record | dropping(mean, pruned) | {"pruned_score": together.mean().item()}


def greedy(cfg: Config) -> bool:
    """Does search=calibrated try the iterative search too? Where a set costs a share of a walk, and no clips."""
    return cfg.score in ("elbo", "output_mse")


def stderr(x: Tensor) -> float:
    """Return the standard error of the mean; 0 for a single number."""
    return (x.std() / x.numel() ** 0.5).item() if x.numel() > 1 else 0.0


def build(cfg: Config, with_: Builder) -> tuple[VideoDiT, list[float]]:
    """Return the model and the cost of each of its blocks, in the unit of `ratio`."""
    folder = trained_folder(cfg.model)
    if cfg.score == "taylor" and cfg.engine == "deepspeed" and (cfg.zero == 3 or cfg.sequence_parallel > 1):
        raise ValueError("score=taylor: needs gradients of whole weights; use zero=1 or 2 and sequence_parallel=1")
    if cfg.score == "attention_mass" and cfg.sequence_parallel > 1:
        raise ValueError("score=attention_mass: looks at all tokens of a clip; use sequence_parallel=1")
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
    """Count one batch of clips, at one time where time does not run: the single skips, the full pass, a search's sets.

    Sets that share walks come in groups of `memory` GB. The recoveries of search=calibrated are a plan of their own.
    """
    n, clips = len(net.blocks), min(cfg.batch, cfg.clips)
    batches = math.ceil(cfg.clips / clips)
    if cfg.score == "attention_mass":
        return Iteration({"model": Net()}, [Walk("model", [Route()])], clips=1, count=cfg.clips * cfg.timesteps)
    if cfg.score in BLOCK_SCORES:
        own = [Walk("model", [Route(grad=True)])] if cfg.score == "taylor" else []
        return Iteration({"model": Net()}, own, clips=clips, count=batches * cfg.timesteps)
    sweeps: list[Keeps] = [[*(without(n, i) for i in range(n)), None], *further(cfg, n)]
    if cfg.score == "frechet":
        sampled = generated.walks(net, [keep for keeps in sweeps for keep in keeps], cfg)
        return Iteration({"model": Net()}, sampled, clips=clips, count=batches)
    size = 4 if cfg.dtype == "float32" else 2  # bytes of a number
    group = max(1, int(cfg.memory * 1e9 / (2 * clips * net.hidden * size)))
    groups = [keeps[i : i + group] for keeps in sweeps for i in range(0, len(keeps), group)]
    walked = [Walk("model", [Route(keep=keep) for keep in keeps]) for keeps in groups]
    return Iteration({"model": Net()}, walked, clips=clips, count=batches * cfg.timesteps)


def further(cfg: Config, n: int) -> list[Keeps]:
    """The sweeps that follow the single skips, if the middle blocks turn out to be the ones to drop."""
    gone = dropped(n, cfg.ratio)
    sweeps: list[Keeps] = []
    if cfg.search == "iterative" or (cfg.search == "calibrated" and greedy(cfg)):
        for k in range(len(gone)):
            left = without(n, *gone[:k])
            sweeps.append([[i for i in left if i != skipped] for skipped in left])
    if cfg.search == "calibrated":
        near = [gone, *swaps([range(n)], gone, [float(i not in gone) for i in range(n)])]
        sweeps.append([without(n, *pruned) for pruned in near])
    return sweeps


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
