"""score=frechet: the distance of generated clips to real ones, without some blocks (VDMini, Sec. 3.2 and 4.1).

Every candidate generates clips for the same prompts from the same noise. Its score is the Frechet distance of their
features to those of the real clips of these prompts. The paper does the same with 1200 clips and the features of a
video network. Shapes: x0 [B, C, F, H, W]; features of clips [clips, D].
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen.data.source import Batch
from fastlightgen.flow import ladder
from fastlightgen.metrics.frechet import frechet
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.cost import Network
from fastlightgen.models.families import FAMILIES
from fastlightgen.models.folder.released import sampling
from fastlightgen.models.sample import sample
from fastlightgen.planner.step import Walk
from fastlightgen.planner.walk import Route
from fastlightgen.rng import generator, normal_like
from fastlightgen.stages.scores import ClipKeys, evaluation_clips
from fastlightgen.stages.sweep import Keeps, Sweeps, fill, parts

NOISE = 27  # the purpose of this file's random draws
FEWEST = 2  # clips, for a covariance
Measure = Callable[[Tensor], Tensor]  # latents of clips, on the CPU -> their features


class Keys(ClipKeys, Protocol):
    """The keys that decide the generated clips; Stage I documents them."""

    model: str
    score_steps: int
    score_guidance: float
    seed: int


def scale_of(cfg: Keys) -> float:
    """The guidance scale of the clips; a negative `score_guidance` is the model's own."""
    return cfg.score_guidance if cfg.score_guidance >= 0 else float(sampling(cfg.model).values["guidance"])


class Generated:
    """Frechet distances of candidates, whose clips share prompts and noise."""

    def __init__(self, cfg: Keys, model: VideoDiT, batches: Callable[[int], Batch], measure: Measure):
        self.cfg, self.model, self.measure = cfg, model, measure
        self.clips = list(evaluation_clips(cfg, batches))
        self.reference = torch.cat([measure(batch.x0.float().cpu()) for _, batch in self.clips]).double()
        times = ladder(cfg.score_steps, float(sampling(cfg.model).values["shift"]))
        self.how: dict[str, Any] = {"times": times, "guidance": scale_of(cfg), "kind": "ode"}

    def features(self, index: int, keep: Sequence[int] | None, tick: Callable[[], object]) -> Tensor:
        """The features of one batch of clips that the network generates with the blocks `keep`."""
        start, batch = self.clips[index]
        noise = normal_like(batch.x0, generator(self.cfg.seed, NOISE, start))
        x0 = sample(self.model, batch.cond, batch.null, noise, keep=keep, tick=tick, **self.how)
        found = self.measure(x0.float().cpu())
        if not found.isfinite().all():
            raise ValueError(
                f"score=frechet: the clips are not finite when blocks {keep} run (None: all); use score=elbo"
            )
        return found

    def scores(self, keeps: Keeps, title: str, sweeps: Sweeps) -> Tensor:
        """The distances of block sets, [sets, 1]. A score on disk is the features of one clip."""

        def measured(index: int, group: list[int], scores: int) -> Tensor:
            left = parts(scores, len(self.how["times"]))
            return self.features(index, keeps[group[0]], lambda: sweep.tick(next(left)))[None]

        sizes = [len(batch.x0) for _, batch in self.clips]
        with sweeps(len(keeps), sum(sizes), title, self.reference.shape[1]) as sweep:
            table = fill(self.model, sizes, sweep, lambda index: 1, measured)
        return torch.tensor([[frechet(self.reference, clips.double())] for clips in table], dtype=torch.float64)


def walks(net: Network, keeps: Keeps, cfg: Keys) -> list[Walk]:
    """Count one batch of clips of every candidate."""
    embeds = FAMILIES[net.family].settings(net.config).embeds_guidance
    prompts = range(1 if scale_of(cfg) == 1 or embeds else 2)
    return [Walk("model", [Route(prompt, keep) for prompt in prompts], cfg.score_steps) for keep in keeps]
