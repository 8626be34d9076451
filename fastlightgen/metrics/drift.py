"""Drift: what users report of distilled video networks, found in the look of clips and in the log. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import torch
from numpy.typing import NDArray

from fastlightgen.metrics import video

LOOK = {
    "brightness": video.brightness,
    "contrast": video.contrast,
    "colourfulness": video.colourfulness,
    "motion": video.frame_difference,
}
NAMES = {  # too low, too high
    "brightness": ("darkening", "over-exposure"),
    "contrast": ("loss of contrast", "rising contrast"),
    "colourfulness": ("fading colours", "over-saturation"),
    "motion": ("motion collapse", "flashing"),
}
PIXELS = 128  # a side; of larger clips every second, third .. pixel is looked at
FLOOR = 0.1  # levels; a still has no logarithm


@dataclass(frozen=True)
class Limits:
    """When an alarm sounds; docs/watching.md has the measurements behind the numbers."""

    # Clips against the real ones of the same prompts, as factors in both directions. In the built-in world (16 sets of
    # 4 prompts) healthy teachers and students differ by up to 1.2, 1.3, 1.2, 2.1, students trained 2 to 4 times too
    # long by 1.5, 1.6, 1.45, 2.9; a still has 1 / 30 of the motion.
    brightness: float = 1.5
    contrast: float = 2.0
    colourfulness: float = 1.5
    motion: float = 3.0
    # A difference must also exceed so many standard errors: of the difference of two sets of real clips with other
    # prompts (sets with the same prompts differ by about a third of that),
    clip_errors: float = 2.5
    # and of a median of log lines, which is looked at with every line.
    line_errors: float = 4.0
    recent: int = 10  # lines whose median is judged: 100 steps at the default log_every
    first: int = 20  # lines that a loss is compared with, besides all earlier ones
    # Growth of the critic's loss. It rises while a student gets sharper: 1.35 times in a healthy run of the built-in
    # world, 1.46 in ones that went on for too long.
    loss: float = 2.0
    # Spread of the student's latents over that of the data, lowest at the first rung: medians of 0.84 to 1.08 in
    # healthy runs, 1.2 in ones that went on for too long.
    contrast_low: float = 0.4
    contrast_high: float = 1.4


@dataclass(frozen=True)
class Finding:
    """Something that is not as usual."""

    alarm: str
    value: float
    usual: float

    def __str__(self) -> str:
        return f"{self.alarm} ({self.value:.3g}, usual {self.usual:.3g})"


def look(frames: NDArray) -> dict[str, float]:
    """Of one clip uint8 [F, H, W, 3]; levels 0..255."""
    every = max(1, math.ceil(max(frames.shape[1:3]) / PIXELS))
    clip = torch.from_numpy(frames[None, :, ::every, ::every].copy()).permute(0, 1, 4, 2, 3) / 255
    return {name: measure(clip).item() for name, measure in LOOK.items()}


def in_clips(made: Sequence[dict], real: Sequence[dict], limits: Limits) -> list[Finding]:
    """Compare made clips with the real ones of the same prompts, which come first in `real`; two more at least."""
    found = []
    for name, names in NAMES.items():
        clips, usual = ([math.log(x[name] + FLOOR) for x in rows] for rows in (made, real))
        away = fmean(clips) - fmean(usual[: len(clips)])
        error = stdev(usual) * math.sqrt(2 / len(clips))
        if abs(away) > max(math.log(getattr(limits, name)), limits.clip_errors * error):
            means = (fmean(x[name] for x in rows) for rows in (made, real[: len(made)]))
            found.append(Finding(f"{names[away > 0]}: {name} of the clips", *means))
    return found


def noise(logs: Sequence[float]) -> float:
    """Standard deviation of one value around its trend, from the median step between neighbours."""
    return 1.4826 * median(abs(a - b) for a, b in zip(logs[1:], logs[:-1], strict=True)) / math.sqrt(2)


def median_error(logs: Sequence[float], *counts: int) -> float:
    """Standard error of the difference of medians of so many values (for a normal distribution)."""
    return 1.2533 * noise(logs) * math.sqrt(sum(1 / n for n in counts))


def in_loss(values: Sequence[float], limits: Limits) -> Finding | None:
    """Has a loss grown, against its first values and against the median of all earlier ones?"""
    if len(values) < limits.first + limits.recent:
        return None
    logs = [math.log(max(v, 1e-30)) for v in values]
    now, usual = median(logs[-limits.recent :]), min(median(logs[: limits.first]), median(logs[: -limits.recent]))
    error = median_error(logs, limits.recent, limits.first)
    if now - usual <= max(math.log(limits.loss), limits.line_errors * error):
        return None
    return Finding("divergence", math.exp(now), math.exp(usual))


def in_contrast(made: Sequence[float], data: Sequence[float], limits: Limits) -> Finding | None:
    """Has the spread of the student's latents left that of the data?"""
    if len(made) < limits.recent:
        return None
    logs = [math.log(max(a, 1e-30) / b) for a, b in zip(made, data, strict=True)]
    now, error = median(logs[-limits.recent :]), limits.line_errors * median_error(logs, limits.recent)
    if min(math.log(limits.contrast_low), -error) <= now <= max(math.log(limits.contrast_high), error):
        return None
    names = NAMES["contrast"]
    return Finding(f"{names[now > 0]}: spread of the student's latents over the data's", math.exp(now), 1.0)
