"""Clips of real videos, drawn at random places and read ahead by threads. The n-th clip of a run is always the same."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlightgen.data.lists import Row, folder_rows, list_in, pictures, read_list, unfit
from fastlightgen.data.video import Unusable, read_clip
from fastlightgen.files.border import regular
from fastlightgen.models.encoding import pixels
from fastlightgen.rng import generator, rows

CLIP = 0  # the purpose of these random draws
TRIES = 20  # clips drawn in place of one that cannot be read


def video_rows(videos: str) -> list[Row]:
    """The videos of a list or a folder, as `encode` takes them; without a list they need no captions."""
    path = Path(videos)
    if path.is_dir() and not list_in(path):
        found = [replace(row, problem=unfit(row.file)) for row in folder_rows(path)]
    else:
        found = read_list(list_in(path) or path if path.is_dir() else path, 0.0)
    usable = [row for row in found if not row.problem]
    if not usable:
        why = f"{found[0].name}: {found[0].problem}" if found else "it holds no videos"
        raise ValueError(f"videos={videos}: none can be used ({why})")
    return usable


@lru_cache(maxsize=4096)
def seconds(file: Path, fps: float) -> float:
    """The duration of a video, or of a folder of pictures at `fps` per second."""
    if file.is_dir():
        return len(pictures(file)) / fps
    import av

    try:
        with av.open(str(regular(file, kind="video"))) as container:
            stream = container.streams.video[0]
            if stream.duration and stream.time_base:
                return float(stream.duration * stream.time_base)
            return (container.duration or 0) / 1e6  # microseconds
    except (av.FFmpegError, OSError, ValueError, IndexError) as err:
        raise Unusable(f"cannot be opened ({getattr(err, 'strerror', None) or err})") from None


class Clips:
    """Batches of clips [B, 3, F, H, W] in [-1, 1], by step. Half of the clips are mirrored."""

    def __init__(
        self,
        videos: Sequence[Row],
        fps: float,
        frames: int,
        size: tuple[int, int],
        batch: int,
        steps: int,
        seed: int,
        workers: int,
    ):
        self.videos, self.fps, self.frames, self.size = videos, fps, frames, size
        self.batch, self.total, self.seed = batch, batch * steps, seed
        self.pool, self.ahead = ThreadPoolExecutor(max(1, workers)), 2 * batch if workers else 0
        self.waiting: dict[int, Future] = {}

    def draw(self, number: int) -> Tensor:
        """Read clip `number`; where a video cannot be read, draw another."""
        why = ""
        for attempt in range(TRIES):
            gen = generator(self.seed, CLIP, number, attempt)
            row = self.videos[int(torch.randint(len(self.videos), (), generator=gen))]
            place, mirrored = torch.rand(2, generator=gen).tolist()
            try:
                end = row.end or seconds(row.file, self.fps)
                room = max(0.0, end - row.start - (self.frames + 1) / self.fps)
                clip = pixels(
                    read_clip(replace(row, start=row.start + place * room), self.fps, self.frames, [self.size])
                )
            except Unusable as err:
                why = f"{row.name}: {err}"
                continue
            return clip.flip(-1) if mirrored < 0.5 else clip
        raise ValueError(f"videos: {TRIES} clips in a row cannot be read, the last {why}; remove such videos")

    def __call__(self, step: int) -> Tensor:
        """The clips of a step, or this share of them (see `rng.share`)."""
        numbers = [step * self.batch + k for k in rows(self.batch)]
        for number in range(numbers[0], min(numbers[-1] + 1 + self.ahead, self.total)):
            if number not in self.waiting:
                self.waiting[number] = self.pool.submit(self.draw, number)
        return torch.stack([self.waiting.pop(number).result() for number in numbers])
