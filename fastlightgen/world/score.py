"""Scores generated clips of the built-in world."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastlightgen.metrics import texture, video
from fastlightgen.metrics.coverage import COVERAGE_NEIGHBOURS, Regions
from fastlightgen.metrics.frechet import features, frechet_statistic
from fastlightgen.metrics.intervals import Resampled, Statistic, compare, mean_of, resample_all, value
from fastlightgen.metrics.kernel import kernel_statistic
from fastlightgen.metrics.scores import SCORES
from fastlightgen.world import reader
from fastlightgen.world.diversity import diversity_statistic, spreads, true_spreads
from fastlightgen.world.shapes import Clips, Shapes

REFERENCE_START, REFERENCE_CLIPS = 1_000_000, 2048  # real clips to compare with, never used as conditions
LOOK = {  # measured of every clip; none reads the caption
    "temporal_flickering": video.temporal_flickering,
    "motion_smoothness": video.motion_smoothness_lin,
    "saturation": video.saturation,
    "sharpness": video.sharpness,
    "texture": texture.energy,
    "persistence": texture.persistence,
}
SETS = ("features", "spread")  # values with several numbers per clip or caption; all others are one number per clip


@dataclass(frozen=True)
class Reference:
    """What is measured of the real clips that every model is compared with."""

    features: Tensor  # [N,D]
    look: dict[str, float]  # mean of each of LOOK


@lru_cache
def reference(seed: int) -> Reference:
    world = Shapes(seed=seed, split="test")
    starts = range(REFERENCE_START, REFERENCE_START + REFERENCE_CLIPS, 256)
    parts = [world.batch(range(s, s + 256)).video for s in starts]
    look = {name: float(torch.cat([measure(p) for p in parts]).mean()) for name, measure in LOOK.items()}
    return Reference(torch.cat([features(p) for p in parts]), look)


def clip_values(generated: Tensor, asked: Clips, seed: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Measure clips [n,F,3,H,W] that were made for the captions and first frames of `asked`.

    Return the values of each clip, float64 [n] (nan: does not count) and features [n,D], and adherence by attribute.
    """
    generated = generated.float().cpu().clamp(0, 1)
    reading = reader.read(generated)
    adherence, attributes = reader.adherence(reading, asked.captions)
    _, psnr = reader.first_frame_psnr(generated, asked.video[:, 0], asked.has_first)
    values = {
        "adherence": torch.from_numpy(adherence),
        "first_frame_psnr": torch.where(asked.has_first, psnr.double(), torch.nan),
        "tracking_error": torch.from_numpy(reader.tracking_error(reading, asked.captions)),
        "motion": torch.from_numpy(reader.motion(reading, asked.captions)),
        "features": features(generated),
    }
    values |= {name: measure(generated) for name, measure in LOOK.items()}
    values["texture"] = values["texture"] / reference(seed).look["texture"]
    return values, attributes


def caption_spreads(generated: Tensor, asked: Clips, noises: int) -> Tensor:
    """Spreads within each caption [captions, 3] of clips that are ordered by caption; see world.diversity."""
    return spreads(generated.float().cpu().clamp(0, 1), asked.captions, noises)


@lru_cache
def _true_spreads(seed: int, captions: int) -> Tensor:
    return true_spreads(Shapes(seed=seed, split="test"), captions)


def statistics(
    values: Mapping[str, Tensor], seed: int, teacher: Tensor | None = None
) -> dict[str, tuple[Statistic, int]]:
    """Each score as (statistic, number of clips or captions that it resamples); `teacher`: features of its clips."""
    feats, real = values["features"], reference(seed).features
    n = len(feats)
    found = {name: (mean_of(x), n) for name, x in values.items() if name not in SETS}
    found["frechet"] = frechet_statistic(real, feats), n
    if teacher is not None and len(teacher) > 1:
        found["to_teacher"] = frechet_statistic(teacher, feats), n
    found["kid"] = kernel_statistic(real, feats), n
    if n > COVERAGE_NEIGHBOURS:
        regions = Regions(real, feats)
        found["precision"], found["recall"] = (regions.precision(), n), (regions.recall(), n)
        found["coverage"] = regions.coverage(), n
    if "spread" in values:
        captions = len(values["spread"])
        found["diversity"] = diversity_statistic(values["spread"], _true_spreads(seed, captions)), captions
    return found


def scores_of(values: Mapping[str, Tensor], seed: int, teacher: Tensor | None = None) -> dict[str, float]:
    return {name: value(statistic, n) for name, (statistic, n) in statistics(values, seed, teacher).items()}


def resampled(values: Mapping[str, Tensor], seed: int, teacher: Tensor | None = None) -> dict[str, Resampled]:
    return resample_all(statistics(values, seed, teacher), seed)


def compared(model: Mapping[str, Resampled], other: Mapping[str, Resampled], seed: int) -> dict[str, dict]:
    """Difference of each score to another model on the same clips and noise, with its interval and the verdict."""
    shared, real = [name for name in model if name in other], reference(seed).look
    return {
        name: asdict(
            compare(model[name], other[name], SCORES[name][2], real.get(name, float("nan")), comparisons=len(shared))
        )
        for name in shared
    }


def score(generated: Tensor, asked: Clips, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """(scores, adherence by attribute) of clips [B,F,3,H,W] made for the captions and first frames of `asked`."""
    values, attributes = clip_values(generated, asked, seed)
    return scores_of(values, seed), attributes
