"""Detects the known failures of distilled video networks in sampled clips and in the training log. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

import torch
from numpy.typing import NDArray

from fastlightgen.metrics import video

LOOK = {  # measured of every clip
    "brightness": video.brightness,
    "contrast": video.contrast,
    "colourfulness": video.colourfulness,
    "motion": video.frame_difference,
}
NAMES = {  # alarms for a value that is too low, too high
    "brightness": ("darkening", "over-exposure"),
    "contrast": ("loss of contrast", "rising contrast"),
    "colourfulness": ("fading colours", "over-saturation"),
    "motion": ("motion collapse", "flashing"),
}
PIXELS = 128  # per side; of larger clips only every second, third, ... pixel is measured
FLOOR = 0.1  # grey levels, added before the logarithm: the motion of a still clip is 0


@dataclass(frozen=True)
class Limits:
    """Thresholds of the alarms; docs/watching.md has the measurements behind them."""

    # Largest factor, up or down, between sampled clips and real clips of the same prompts. In the built-in world (16
    # sets of 4 prompts) healthy teachers and students differ by up to 1.2, 1.3, 1.2, 2.1, students trained 2 to 4 times
    # too long by 1.5, 1.6, 1.45, 2.9; a still clip has 1 / 30 of the motion.
    brightness: float = 1.5
    contrast: float = 2.0
    colourfulness: float = 1.5
    motion: float = 3.0
    # A difference between clips must also exceed this many standard errors of the difference between two sets of real
    # clips with different prompts (sets with the same prompts differ by about a third of that).
    clip_errors: float = 2.5
    # A change in the log must also exceed this many standard errors of a median of log lines. Higher than clip_errors,
    # because it is tested with every line.
    line_errors: float = 4.0
    recent: int = 10  # lines whose median is tested: 100 steps at the default log_every
    first: int = 20  # first lines of the log: their median is one of the two baselines of a loss
    # Largest growth of the critic's loss. It rises while a student gets sharper: by a factor of 1.35 in a healthy run
    # of the built-in world, by 1.46 in runs that lasted too long.
    loss: float = 2.0
    # Standard deviation of the student's latents divided by that of the data; the first rung is lowest. Medians are
    # 0.84 to 1.08 in healthy runs, 1.2 in runs that lasted too long.
    contrast_low: float = 0.4
    contrast_high: float = 1.4


@dataclass(frozen=True)
class Finding:
    """An alarm: the value that triggered it, and the usual value."""

    alarm: str
    value: float
    usual: float

    def __str__(self) -> str:
        return f"{self.alarm} ({self.value:.3g}, usual {self.usual:.3g})"


def look(frames: NDArray) -> dict[str, float]:
    """Brightness, contrast, colourfulness and motion of one clip, uint8 [F, H, W, 3]; in levels 0..255."""
    every = max(1, math.ceil(max(frames.shape[1:3]) / PIXELS))
    clip = torch.from_numpy(frames[None, :, ::every, ::every].copy()).permute(0, 1, 4, 2, 3) / 255
    return {name: measure(clip).item() for name, measure in LOOK.items()}


def in_clips(made: Sequence[dict], real: Sequence[dict], limits: Limits) -> list[Finding]:
    """Compare the looks of sampled clips with those of real clips.

    `real` starts with the real clips of the same prompts, in order, followed by at least two more.
    """
    found = []
    for name, names in NAMES.items():
        # Logarithms, so that a limit is a factor in both directions.
        clips, usual = ([math.log(x[name] + FLOOR) for x in rows] for rows in (made, real))
        away = fmean(clips) - fmean(usual[: len(clips)])
        error = stdev(usual) * math.sqrt(2 / len(clips))  # of the difference of two means
        if abs(away) > max(math.log(getattr(limits, name)), limits.clip_errors * error):
            means = (fmean(x[name] for x in rows) for rows in (made, real[: len(made)]))
            found.append(Finding(f"{names[away > 0]}: {name} of the clips", *means))
    return found


def noise(logs: Sequence[float]) -> float:
    """Standard deviation of one value around the trend, estimated from the median step between neighbours."""
    # 1.4826 turns a median absolute deviation into a standard deviation (for a normal distribution).
    return 1.4826 * median(abs(a - b) for a, b in zip(logs[1:], logs[:-1], strict=True)) / math.sqrt(2)


def median_error(logs: Sequence[float], *counts: int) -> float:
    """Standard error of the difference of medians of `counts` values each (for a normal distribution)."""
    # The standard error of a median is sqrt(pi / 2) = 1.2533 times that of a mean.
    return 1.2533 * noise(logs) * math.sqrt(sum(1 / n for n in counts))


def in_loss(values: Sequence[float], limits: Limits) -> Finding | None:
    """Report a loss whose recent median grew beyond the lower of two: of its first, and of all earlier values."""
    if len(values) < limits.first + limits.recent:
        return None
    logs = [math.log(max(v, 1e-30)) for v in values]
    now, usual = median(logs[-limits.recent :]), min(median(logs[: limits.first]), median(logs[: -limits.recent]))
    error = median_error(logs, limits.recent, limits.first)
    if now - usual <= max(math.log(limits.loss), limits.line_errors * error):
        return None
    return Finding("divergence", math.exp(now), math.exp(usual))


def in_contrast(made: Sequence[float], data: Sequence[float], limits: Limits) -> Finding | None:
    """Report a standard deviation of the student's latents that differs too much from the data's."""
    if len(made) < limits.recent:
        return None
    logs = [math.log(max(a, 1e-30) / b) for a, b in zip(made, data, strict=True)]
    now, error = median(logs[-limits.recent :]), limits.line_errors * median_error(logs, limits.recent)
    if min(math.log(limits.contrast_low), -error) <= now <= max(math.log(limits.contrast_high), error):
        return None
    names = NAMES["contrast"]
    return Finding(f"{names[now > 0]}: spread of the student's latents over the data's", math.exp(now), 1.0)
