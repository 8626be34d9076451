"""choose=best: keep the student's weights whose clips come closest to real ones, and make them the stage's result.

Every so many updates the student, or its average, samples the same held-out prompts from the same noise with its own
ladder. The score is the kernel distance between features of these clips and of real held-out clips. It needs no picture
of the prompts. The best weights so far stand in RUN/stage3/best.safetensors with their step and score. They stay there,
so that a finished stage can go on to more steps.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen.data.cache import META
from fastlightgen.data.source import Batch, CacheSource, Source
from fastlightgen.engine.local import LocalEngine
from fastlightgen.engine.roles import Stage
from fastlightgen.files.kinds import BEST
from fastlightgen.files.tensors import read_metadata, read_tensors, save_tensors, summed
from fastlightgen.metrics.kernel import kernel_distance
from fastlightgen.models.sample import sample
from fastlightgen.parallel.log import say
from fastlightgen.rng import generator, normal_like

PURPOSE = 14  # the key of these random draws
START = 2_000_000  # first held-out clip of an unlimited source; evaluations and previews use smaller numbers
REAL = 512  # real clips to compare with, of an unlimited source
FEWEST = 8  # held-out clips of a cache; with fewer the distance is noise
DELETE = "delete it to choose anew"
FILE, ROLE = "best.safetensors", "student"


class Keys(Protocol):
    """The keys that this file reads; the method documents them."""

    seed: int
    batch: int
    micro_batch: int
    choose_every: int
    choose_clips: int
    data: str


class Choice:
    """Measures the student now and then, and keeps its best weights."""

    def __init__(
        self, cfg: Keys, engine: LocalEngine, source: Source, folder: Path, features: Callable[[Tensor], Tensor]
    ):
        self.cfg, self.engine, self.source, self.features = cfg, engine, source, features
        self.file = folder / FILE
        self.best: dict[str, Any] = {}  # step, updates and score of the weights in the file
        self.looked = 0  # number of updates at the last look
        first, prompts, real = START, cfg.choose_clips, REAL
        if isinstance(source, CacheSource):  # its held-out clips are few, so that the real ones may have the prompts
            first, real = 0, min(REAL, len(source.rest))
            prompts = min(prompts, real)
            if real < FEWEST:
                raise ValueError(
                    f"choose=best: data={cfg.data} holds out {real} clips; wanted {FEWEST} or more, which takes "
                    f"{10 * FEWEST} clips of one size; use choose=last"
                )
        self.prompts = range(first, first + prompts)
        self.real = range(first, first + real) if first == 0 else range(self.prompts.stop, self.prompts.stop + real)
        self.reference: Tensor | None = None  # features of the real clips, computed once

    def start(self, step: int) -> None:
        """Called before the first step, or when a run continues after `step`."""
        count = self.engine.count[ROLE]
        self.looked = count - count % self.cfg.choose_every
        if self.file.exists():
            self.best = read_metadata(self.file, META, BEST, DELETE)
            if self.best["step"] > step:  # these steps will be computed again
                self.best = {}

    def due(self, stage: Stage, step: int) -> bool:
        """Is the student to be measured after `step`?"""
        count = self.engine.count[ROLE]
        return count != self.looked and (count % self.cfg.choose_every == 0 or step == stage.iters)

    def look(self, stage: Stage, step: int) -> dict[str, float]:
        """Measure the student; return the numbers to log."""
        count = self.looked = self.engine.count[ROLE]
        with self.engine.autocast(), self.engine.averaged():
            line = {"step": step, "updates": count, "score": self.score(stage)}
            if not math.isfinite(line["score"]):
                raise ValueError(
                    f"step {step}: the student's distance to real clips is {line['score']}; lower lr or clip"
                )
            better = not self.best or line["score"] < self.best["score"]
            if better:
                tensors = {k: v.to("cpu", copy=True) for k, v in stage.roles[ROLE].net.state_dict().items()}
                save_tensors(self.file, tensors, {META: json.dumps(line)} | summed(tensors))
                self.best = line
        say(
            f"choose: step {step}: distance to real clips {line['score']:.4g}"
            + (", the best so far" if better else f"; the best is {self.best['score']:.4g} at step {self.best['step']}")
        )
        return line

    def score(self, stage: Stage) -> float:
        """The kernel distance of the student's clips to real ones; smaller is better, about 0 for real clips."""
        how, device = stage.sampler(), self.engine.device
        if self.reference is None:
            self.reference = torch.cat([self.features(batch.x0.cpu()) for _, batch in self.batches(self.real)])
        made = []
        for first, batch in self.batches(self.prompts):
            batch = batch.to(device)
            noise = normal_like(batch.x0, generator(self.cfg.seed, PURPOSE, first))
            x0 = sample(cond=batch.cond, null=batch.null, noise=noise, seed=self.cfg.seed + first, **how)
            made.append(self.features(x0.float().cpu()))
        return kernel_distance(self.reference, torch.cat(made))

    def batches(self, clips: range) -> Iterator[tuple[int, Batch]]:
        """Yield (number of the first clip, clips), as many at a time as in training, for memory."""
        at_once = self.cfg.micro_batch or self.cfg.batch
        for first in clips[::at_once]:
            yield first, self.source.held_out(first, min(at_once, clips.stop - first))

    def save(self, stage: Stage, folder: Path) -> None:
        """Write the best weights as the stage's result; its card names their step and score."""
        if not self.best:  # the student was never updated
            stage.save(folder, self.engine.save_model)
            return
        stage.roles[ROLE].net.load_state_dict(read_tensors(self.file))
        say(f"choose: the result is the student of step {self.best['step']} ({self.best['updates']} updates)")

        def write(*args: Any, **card: Any) -> None:
            self.engine.save_model(*args, **card, chosen=self.best)

        stage.save(folder, write)
