"""A network that is evaluated in the built-in world, and the clips that it makes for held-out captions."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.config import Evaluate
from fastlightgen.data.source import Batch
from fastlightgen.models.experts import Model
from fastlightgen.models.sample import num_evaluations, sample
from fastlightgen.parallel.log import bar
from fastlightgen.rng import generator
from fastlightgen.world.codec import Codec
from fastlightgen.world.shapes import Clips, Shapes
from fastlightgen.world.source import shapes_batch


@dataclass
class Subject:
    """A network to evaluate, with its sampling plan."""

    name: str  # of its files
    title: str  # in reports
    model: Model
    folder: Path
    plan: dict  # arguments of models.sample.sample
    keep: list[int] | None = None  # the blocks that run; None: all

    @property
    def evaluations(self) -> int:
        return num_evaluations(self.plan, self.model.embeds_guidance)

    def block_flops(self, batch: Batch) -> list[int]:
        """Floating-point operations of each running block in one evaluation."""
        flops = self.model.block_flops(batch.x0, batch.cond)
        return [f for i, f in enumerate(flops) if self.keep is None or i in self.keep]

    @property
    def num_params(self) -> int:
        """Parameters of the network without the blocks that do not run."""
        total = sum(p.numel() for p in self.model.parameters())
        if self.keep is None:
            return total
        dropped = [b for i, b in enumerate(self.model.get_submodule("blocks").children()) if i not in self.keep]
        return total - sum(p.numel() for b in dropped for p in b.parameters())


def draw(cfg: Evaluate, subject: Subject, count: int, noises: int = 1, first: int = 0) -> tuple[Tensor, Clips, float]:
    """Sample clips first, first + 1, ...: (clips [n,F,3,H,W], the real clips with their prompts, seconds per clip).

    The noise depends on the seed and the clip's position only, so that all subjects start from the same noise. With
    several noises per prompt, the clips of a prompt follow each other, and no first frame is given.
    """
    if cfg.data != "shapes":
        raise ValueError(f"data={cfg.data}: only clips of data=shapes can be scored, because their truth is known")
    world, made, asked, seconds = Shapes(seed=cfg.seed, split="test"), [], [], 0.0
    purpose = 8  # of the random numbers
    if noises > 1:
        world.first_frame_prob, purpose = 0.0, 12
    device = next(subject.model.parameters()).device
    plan = subject.plan
    with bar(count * len(plan["times"]), f"sampling {subject.title}", cfg.progress, unit="step") as progress:
        for start in range(first, first + count, cfg.batch):
            clips = world.batch([i // noises for i in range(start, min(start + cfg.batch, first + count))])
            batch = shapes_batch(clips).to(device)
            places = range(start, start + len(batch.x0))
            each = [torch.randn(batch.x0.shape[1:], generator=generator(cfg.seed, purpose, i)) for i in places]
            noise = torch.stack(each).to(device)
            clock = time.perf_counter()
            tick = partial(progress.update, len(noise))
            seed, keep = cfg.seed + start, subject.keep
            x0 = sample(subject.model, batch.cond, batch.null, noise, **plan, seed=seed, keep=keep, tick=tick)
            made.append(Codec().decode(x0.float().cpu()))  # the copy to the CPU waits for the GPU
            seconds += time.perf_counter() - clock
            asked.append(clips)
    return torch.cat(made), join(asked), seconds / count


def join(parts: list[Clips]) -> Clips:
    """Concatenate clips; the truth, which no score reads, is that of the first part."""
    captions = [c for part in parts for c in part.captions]
    return Clips(torch.cat([p.video for p in parts]), captions, torch.cat([p.has_first for p in parts]), parts[0].truth)
