"""Video files to clips of exact size and timing: decoded with PyAV, resampled in time, resized and centre-cropped.

A clip of F frames at `fps` shows, at time start + k / fps, the picture that a player shows then: the last one whose
time stamp is not later. A folder of pictures counts as already at `fps`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastlightgen.data.lists import Row, pictures

if TYPE_CHECKING:  # av is imported where a video is read
    from av import VideoFrame

ROUNDING = 2e-3  # seconds: containers round time stamps, Matroska to whole milliseconds
Size = tuple[int, int]  # height, width


class Unusable(ValueError):
    """A clip that is skipped, and why."""


@dataclass(frozen=True)
class Shown:
    """A picture and the time, in seconds, during which a player shows it; read() makes it RGB [h, w, 3]."""

    first: float
    until: float
    read: Callable[[], NDArray]
    aspect: float = 1.0  # width over height of a pixel


def read_clip(row: Row, fps: float, frames: int, buckets: Sequence[Size]) -> NDArray:
    """uint8 [F, H, W, 3] of one row, of the bucket that is nearest in shape; Unusable if it cannot be had."""
    if row.problem:
        raise Unusable(row.problem)
    shown = folder_pictures(row.file, fps) if row.file.is_dir() else decode(row.file, row.start)
    out: list[NDArray] = []
    for item, times in resample(shown, fps, frames, row.start, row.end):
        picture = item.read()
        if not out:
            bucket = nearest(picture.shape[0], picture.shape[1] * item.aspect, buckets)
        out += [fit(picture, bucket, item.aspect)] * times
    if len(out) < frames:
        got, wanted = len(out) / fps, frames / fps
        raise Unusable(f"too short: {got:.2f} s from {row.start:g} s on, wanted {wanted:.2f} s ({frames} frames)")
    return np.stack(out)


def resample(
    shown: Iterable[Shown], fps: float, frames: int, start: float, end: float | None
) -> Iterator[tuple[Shown, int]]:
    """Which pictures are shown at the times start + k / fps < end, k < frames, and at how many of them."""
    done = 0
    for item in shown:
        stop = item.until if end is None else min(item.until, end)
        upto = min(frames, math.ceil((stop - start - ROUNDING) * fps))
        if upto > done:
            yield item, upto - done
            done = upto
        if done == frames or (end is not None and item.until >= end):
            return


def decode(file: Path, start: float, seek: bool = True) -> Iterator[Shown]:
    """The pictures of a video that are shown after `start` seconds."""
    import av

    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise Unusable("holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            aspect = float(stream.sample_aspect_ratio or 1)
            usual = 1 / float(stream.average_rate or 25)  # how long a picture is shown where nothing says it
            tick = stream.time_base  # seconds of a unit of its time stamps
            if tick is None:
                raise Unusable("has no time base")
            origin = (stream.start_time or 0) * tick
            seek = seek and start > 1
            if seek:  # to the key picture before it
                container.seek(int(start / tick) + (stream.start_time or 0), stream=stream)
            last: tuple[float, VideoFrame] | None = None  # when the picture before this one begins, and that picture
            now, duration = 0.0, usual
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise Unusable(f"damaged at {frame.time or 0:.2f} s")
                if frame.pts is None or frame.time_base is None:
                    raise Unusable("has pictures without time stamps")
                now = float(frame.pts * frame.time_base - origin)
                if seek and last is None and now > start:
                    break  # the seek went too far
                if last and now > start:
                    yield Shown(last[0], now, *picture_of(last[1], aspect))
                last = now, frame
                duration = float(frame.duration * frame.time_base) if frame.duration else usual
            if last:
                yield Shown(last[0], last[0] + duration, *picture_of(last[1], aspect))
    except (av.FFmpegError, OSError) as err:
        raise Unusable(f"cannot be decoded ({getattr(err, 'strerror', None) or err})") from None
    if seek and not last:
        yield from decode(file, start, seek=False)


def picture_of(frame: "VideoFrame", aspect: float) -> tuple[Callable[[], NDArray], float]:
    """How to read a decoded picture, and its pixels' aspect; phones store rotation as metadata."""
    quarters = round(frame.rotation / 90)  # counter-clockwise
    return partial(upright, frame, quarters), 1 / aspect if quarters % 2 else aspect


def upright(frame: "VideoFrame", quarters: int) -> NDArray:
    return np.rot90(frame.to_ndarray(format="rgb24"), quarters)


def folder_pictures(folder: Path, fps: float) -> Iterator[Shown]:
    """The pictures of a folder, one every 1 / fps seconds."""
    for k, file in enumerate(pictures(folder)):
        yield Shown(k / fps, (k + 1) / fps, partial(read_picture, file))


def read_picture(file: Path) -> NDArray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as err:
        raise Unusable(f"{file.name} cannot be read ({err})") from None


def nearest(height: float, width: float, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest, in the logarithm of height over width; the first one of equals."""
    return min(buckets, key=lambda b: round(abs(math.log(height / width * b[1] / b[0])), 9))


def fit(picture: NDArray, bucket: Size, aspect: float = 1.0) -> NDArray:
    """Crop the centre to the bucket's shape and resize it, in one step (bicubic, antialiased)."""
    from PIL import Image

    (h, w, _), (height, width) = picture.shape, bucket
    if (h, w) == bucket and aspect == 1:
        return picture
    scale = max(height / h, width / (w * aspect))
    crop_h, crop_w = height / scale, width / (scale * aspect)
    left, top = (w - crop_w) / 2, (h - crop_h) / 2
    image = Image.fromarray(np.ascontiguousarray(picture))
    box = (left, top, min(left + crop_w, w), min(top + crop_h, h))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def source_hash(file: Path) -> str:
    """Short hash of a video's bytes, or of the names and bytes of a folder's pictures."""
    h = hashlib.sha256()
    for part in pictures(file) if file.is_dir() else [file]:
        h.update(part.name.encode() if file.is_dir() else b"")
        with open(part, "rb") as f:
            while chunk := f.read(1 << 20):
                h.update(chunk)
    return h.hexdigest()[:16]
