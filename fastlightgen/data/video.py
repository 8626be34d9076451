"""Cuts clips of exact size and timing from video files: decodes with PyAV, resamples in time, crops and resizes.

Frame k of a clip is the picture that a player shows at time start + k / fps: the last one whose time stamp is not
later. The pictures of a folder are already `fps` per second.
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
from fastlightgen.files.border import opened, picture, regular

if TYPE_CHECKING:  # PyAV is optional: it is imported when a video is read
    from av import VideoFrame

ROUNDING = 2e-3  # seconds; containers round time stamps, Matroska to milliseconds
Size = tuple[int, int]  # height, width


class Unusable(ValueError):
    """The reason why a clip is skipped."""


class TooShort(Unusable):
    """A clip that ends too early; it has `frames` frames at the wanted rate."""

    def __init__(self, reason: str, frames: int):
        super().__init__(reason)
        self.frames = frames


@dataclass(frozen=True)
class Shown:
    """A picture, and the seconds between which a player shows it; read() returns it as RGB uint8 [h, w, 3]."""

    first: float
    until: float
    read: Callable[[], NDArray]
    aspect: float = 1.0  # width / height of a pixel


def read_clip(row: Row, fps: float, frames: int, buckets: Sequence[Size]) -> NDArray:
    """Read a row's clip as uint8 [F, H, W, 3] in the size of the nearest bucket; raise Unusable if that fails."""
    if row.problem:
        raise Unusable(row.problem)
    shown = folder_pictures(row.file, fps) if row.file.is_dir() else decode(row.file, row.start)
    out: list[NDArray] = []
    for item, times in resample(shown, fps, frames, row.start, row.end):
        picture = item.read()
        if not out:  # the first picture decides the size of the clip
            bucket = nearest(picture.shape[0], picture.shape[1] * item.aspect, buckets)
        out += [fit(picture, bucket, item.aspect)] * times
    if len(out) < frames:
        got, wanted = len(out) / fps, frames / fps
        raise TooShort(
            f"too short: {got:.2f} s from {row.start:g} s on, wanted {wanted:.2f} s ({frames} frames)", len(out)
        )
    return np.stack(out)


def resample(
    shown: Iterable[Shown], fps: float, frames: int, start: float, end: float | None
) -> Iterator[tuple[Shown, int]]:
    """Yield each picture that some frame shows, with the number of its frames.

    Frame k, for k < frames, shows time start + k / fps; frames at or after `end` do not exist.
    """
    done = 0  # frames that have a picture
    for item in shown:
        stop = item.until if end is None else min(item.until, end)
        # Frames 0 to upto - 1 lie before the end of this picture. ROUNDING keeps a frame that lies exactly there out.
        upto = min(frames, math.ceil((stop - start - ROUNDING) * fps))
        if upto > done:
            yield item, upto - done
            done = upto
        if done == frames or (end is not None and item.until >= end):
            return


def decode(file: Path, start: float, seek: bool = True) -> Iterator[Shown]:
    """Yield the pictures of a video that are shown after `start` seconds."""
    import av

    try:
        with av.open(str(regular(file, kind="video"))) as container:
            if not container.streams.video:
                raise Unusable("holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            aspect = float(stream.sample_aspect_ratio or 1)
            usual = 1 / float(stream.average_rate or 25)  # duration in seconds of a picture without one
            tick = stream.time_base  # seconds per unit of the time stamps
            if tick is None:
                raise Unusable("has no time base")
            origin = (stream.start_time or 0) * tick  # videos need not begin at time stamp 0
            seek = seek and start > 1
            if seek:  # jump to the last key picture before `start`
                container.seek(int(start / tick) + (stream.start_time or 0), stream=stream)
            # A picture is shown until the next one begins, so each is yielded one step late: (its start, picture).
            last: tuple[float, VideoFrame] | None = None
            now, duration = 0.0, usual
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise Unusable(f"damaged at {frame.time or 0:.2f} s")
                if frame.pts is None or frame.time_base is None:
                    raise Unusable("has pictures without time stamps")
                now = float(frame.pts * frame.time_base - origin)
                if seek and last is None and now > start:
                    break  # the seek landed after `start`: decode again from the beginning, below
                if last and now > start:
                    yield Shown(last[0], now, *picture_of(last[1], aspect))
                last = now, frame
                duration = float(frame.duration * frame.time_base) if frame.duration else usual
            if last:
                yield Shown(last[0], last[0] + duration, *picture_of(last[1], aspect))
    except (av.FFmpegError, OSError, ValueError, OverflowError) as err:
        if isinstance(err, Unusable):
            raise
        raise Unusable(f"cannot be decoded ({getattr(err, 'strerror', None) or err})") from None
    if seek and not last:
        yield from decode(file, start, seek=False)


def picture_of(frame: "VideoFrame", aspect: float) -> tuple[Callable[[], NDArray], float]:
    """Return a function that reads a decoded picture upright, and the picture's aspect (width / height of a pixel)."""
    # Phones store rotation as metadata. A quarter turn swaps the width and height of a pixel.
    quarters = round(frame.rotation / 90)  # counter-clockwise
    return partial(upright, frame, quarters), 1 / aspect if quarters % 2 else aspect


def upright(frame: "VideoFrame", quarters: int) -> NDArray:
    """The picture as RGB [h, w, 3], rotated by quarter turns."""
    return np.rot90(frame.to_ndarray(format="rgb24"), quarters)


def folder_pictures(folder: Path, fps: float) -> Iterator[Shown]:
    """Yield the pictures of a folder, each shown for 1 / fps seconds."""
    for k, file in enumerate(pictures(folder)):
        yield Shown(k / fps, (k + 1) / fps, partial(read_picture, file))


def read_picture(file: Path) -> NDArray:
    try:
        return np.asarray(picture(file))
    except ValueError as err:
        raise Unusable(str(err).replace(f"{file.parent}/", "")) from None


def nearest(height: float, width: float, buckets: Sequence[Size]) -> Size:
    """Return the bucket nearest in shape, by the logarithm of height / width; the first one of equals."""
    # Rounding makes mathematically equal distances equal, so that ties do not depend on floating-point noise.
    return min(buckets, key=lambda b: round(abs(math.log(height / width * b[1] / b[0])), 9))


def fit(picture: NDArray, bucket: Size, aspect: float = 1.0) -> NDArray:
    """Crop a picture's centre to the bucket's shape and resize it, in one step (bicubic, antialiased)."""
    from PIL import Image

    (h, w, _), (height, width) = picture.shape, bucket
    if (h, w) == bucket and aspect == 1:
        return picture
    scale = max(height / h, width / (w * aspect))  # the smallest scale at which the picture covers the bucket
    crop_h, crop_w = height / scale, width / (scale * aspect)  # in pixels of the picture
    left, top = (w - crop_w) / 2, (h - crop_h) / 2
    image = Image.fromarray(np.ascontiguousarray(picture))
    box = (left, top, min(left + crop_w, w), min(top + crop_h, h))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def source_hash(file: Path) -> str:
    """A short hash of a video's bytes, or of the names and bytes of a folder's pictures."""
    h = hashlib.sha256()
    for part in pictures(file) if file.is_dir() else [file]:
        h.update(part.name.encode() if file.is_dir() else b"")
        with opened(part) as f:
            while chunk := f.read(1 << 20):
                h.update(chunk)
    return h.hexdigest()[:16]
