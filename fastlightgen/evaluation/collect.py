"""Cuts videos into clips of one size, one rate and one number of frames, and measures each clip.

A longer video gives several clips, one after the other. Of every clip only numbers are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlightgen.config import Evaluate, parse_size
from fastlightgen.data.lists import Row
from fastlightgen.data.video import TooShort, Unusable, decode, folder_pictures, read_clip
from fastlightgen.metrics.footage import contrasts, spread, values_of
from fastlightgen.metrics.frechet import features
from fastlightgen.metrics.natural import Moments
from fastlightgen.metrics.network import Network
from fastlightgen.parallel.log import bar

FEWEST = 5  # frames of a clip; the hand-made features compare frames that are 4 apart
SMALL = 64  # pixels of the shorter side of the clips that the hand-made features see
FRAMES = 16  # of these clips, evenly spread


@dataclass(frozen=True)
class Cut:
    """What all clips have in common."""

    size: tuple[int, int]  # height, width
    frames: int
    fps: float


@dataclass
class Footage:
    """What was measured of the clips of one folder."""

    names: list[str] = field(default_factory=list)  # of each clip: FILE, or FILE@SECONDS
    video: list[int] = field(default_factory=list)  # number of each clip's file
    values: dict[str, list[float]] = field(default_factory=dict)
    contrasts: list[Moments] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)  # hand-made
    network: list[Tensor] = field(default_factory=list)  # of the network, if there is one
    skipped: dict[str, str] = field(default_factory=dict)  # file -> why


def cut_of(cfg: Evaluate, rows: Sequence[Row]) -> Cut:
    """Size, number of frames and rate of the clips: those the user gives, else those of the first usable video."""
    if cfg.size and cfg.fps:
        height, width, frames = parse_size(cfg.size)
        return checked(Cut((height, width), frames, cfg.fps), cfg)
    problem = "no videos"
    for row in rows:
        try:
            if row.problem:
                raise Unusable(row.problem)
            if row.file.is_dir() and not cfg.fps:
                raise Unusable("pictures have no rate; give fps=")
            shown = list(folder_pictures(row.file, cfg.fps) if row.file.is_dir() else decode(row.file, row.start))
            if not shown:
                raise Unusable("holds no pictures")
            seconds = (row.end or shown[-1].until) - row.start
            fps = cfg.fps or round(len(shown) / (shown[-1].until - shown[0].first), 3)
            height, width = shown[0].read().shape[:2]
            frames = max(1, round(seconds * fps))
            if cfg.size:
                height, width, frames = parse_size(cfg.size)
            return checked(Cut((height, width), frames, fps), cfg)
        except Unusable as err:
            problem = f"{row.name}: {err}"
    raise ValueError(f"videos={cfg.videos}: no video can be read ({problem})")


def checked(cut: Cut, cfg: Evaluate) -> Cut:
    if cut.frames < FEWEST:
        where = f"size={cfg.size}" if cfg.size else f"videos={cfg.videos}"
        raise ValueError(f"{where}: clips of {cut.frames} frames; wanted {FEWEST} or more, to measure motion")
    return cut


def clips_of(row: Row, cut: Cut) -> Iterator[tuple[float, Tensor]]:
    """Yield (start in seconds, frames uint8 [F,H,W,3]) of the clips of a video; raise Unusable if it has none."""
    number = 0
    while True:
        start = row.start + number * cut.frames / cut.fps
        part = Row(row.name, row.file, start=start, end=row.end, problem=row.problem)
        try:
            frames = read_clip(part, cut.fps, cut.frames, [cut.size])
        except TooShort:
            if number:
                return
            raise
        yield start, torch.from_numpy(frames)
        number += 1


def small(frames: Tensor) -> Tensor:
    """The clip [1,F,3,h,w] in [0,1] of which the hand-made features are taken, alike for all resolutions."""
    x = frames[spread(len(frames), FRAMES)].permute(0, 3, 1, 2).float() / 255
    shorter = min(x.shape[-2:])
    if shorter > SMALL:
        x = F.interpolate(x, size=[max(1, round(n * SMALL / shorter)) for n in x.shape[-2:]], mode="area")
    return x[None]


def measure(rows: Sequence[Row], cut: Cut, network: Network | None, title: str, progress: bool) -> Footage:
    """Measure all clips of the videos; those that cannot be read are skipped with the reason."""
    found = Footage()
    with bar(len(rows), title, progress, unit="video") as ticks:
        for number, row in enumerate(rows):
            try:
                for start, frames in clips_of(row, cut):
                    add_clip(found, f"{row.name}@{start:g}" if start else row.name, number, frames, cut, network)
            except Unusable as err:
                found.skipped[row.name] = str(err)
            ticks.update()
    return found


def add_clip(found: Footage, name: str, number: int, frames: Tensor, cut: Cut, network: Network | None) -> None:
    found.names.append(name)
    found.video.append(number)
    for score, value in values_of(frames, cut.fps).items():
        found.values.setdefault(score, []).append(value)
    found.contrasts.append(contrasts(frames))
    found.features.append(features(small(frames))[0])
    if network:
        found.network.append(network.features(frames))
