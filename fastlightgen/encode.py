"""python -m fastlightgen.encode videos=DIR_OR_LIST pipeline=DIR out=DIR ...: encodes videos and captions to a cache."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from fastlightgen.config import ConfigError, Encode, command, main, parse_buckets
from fastlightgen.data.lists import Row, list_in, read_list
from fastlightgen.data.video import TooShort, Unusable, read_clip, source_hash

if TYPE_CHECKING:  # the import takes a second, too long for --help
    from fastlightgen.data.writer import Writer
    from fastlightgen.models.family import Clips
    from fastlightgen.models.geometry import Geometry


@dataclass(frozen=True)
class Skip:
    """Why a clip is skipped; `frames`: a length that it could have, if it is only too short."""

    reason: str
    frames: int = 0


Clip = tuple[NDArray, str] | Skip  # frames and the hash of the video
Read = Callable[[Row], Clip]


def encode(cfg: Encode) -> None:
    """Encode this process's share of the clips; the process that finishes last also writes the cache's index."""
    from fastlightgen.data.cache import NEGATIVE, NULL
    from fastlightgen.data.writer import Writer
    from fastlightgen.models.folder.released import sampling
    from fastlightgen.parallel.log import say
    from fastlightgen.pipelines.encoders import family_of_folder

    rank, ranks = place(cfg)
    _, family = family_of_folder(cfg.pipeline)
    clips = sized(cfg, family.geometry, family.clips.at(sampling(cfg.pipeline).values["size"]))
    videos = Path(cfg.videos)
    if videos.is_dir() and (found := list_in(videos)):
        say(f"videos={videos}: takes the list in it, {found.name}")
        videos = found
    rows = read_list(videos, cfg.min_dover)
    fps, frames, buckets = clips.fps, clips.frames, clips.buckets
    encoders = load_encoders(cfg, rank)
    made_with = {"fps": fps, "frames": frames, "null_prompt": cfg.null_prompt, "latents": "mode"}
    types = {"dtype": cfg.dtype, "save_dtype": cfg.save_dtype}
    settings = {
        "description": encoders.description() | made_with | types,
        "buckets": [f"{h}x{w}" for h, w in buckets],
        "min_dover": cfg.min_dover,
    }
    out = Path(cfg.out)
    writer = Writer(out, settings, rows, cfg.shard, rank, cfg.progress)

    def write_prompt(name: str, text: str) -> None:
        if writer.lacks(name):
            fields = stored(encoders.null(text, buckets[0]), cfg.save_dtype, family.cond.text_fields)
            writer.write_prompt(name, fields, text)

    with writer.opened():
        say(outlook(writer, rows, encoders, clips, cfg))
        if encoders.official_negative:  # a complete cache without it gets it too
            write_prompt(NEGATIVE, encoders.official_negative)
        if not writer.complete:
            write_prompt(NULL, cfg.null_prompt)
            stride = family.geometry.frame_stride
            read = partial(read_row, fps=fps, frames=frames, buckets=buckets, stride=stride)
            # Rank r of n writes the parts r, r + n, r + 2 n, ...
            make_parts(cfg, writer, encoders, rows, list(writer.parts)[rank::ranks], read)
        counts = writer.finish()
    if counts is None:
        say(f"rank {rank} of {ranks} is done; the last rank to finish writes the index")
    else:
        skipped = f", {counts['skipped']} skipped: {out / 'skipped.json'}" if counts["skipped"] else ""
        say(f"{out}: {counts['clips']} clips{skipped}{counts['hint']}")
        say(f"next: {command('train', stage=1, model=cfg.pipeline, data=cfg.out)}")


def outlook(writer: "Writer", rows: Sequence[Row], encoders, clips: "Clips", cfg: Encode) -> str:
    """Say before the long part how many clips there are to encode, and whether they fit on the disk."""
    from fastlightgen.data.writer import free_bytes
    from fastlightgen.parallel.log import size

    usable = sum(not rows[i].problem for part in writer.parts.values() for i in part)
    needed = usable * clip_bytes(encoders, max(h * w for h, w in clips.buckets), clips.frames, cfg)
    return (
        f"{usable} {'new ' * bool(writer.earlier)}of {len(rows)} listed clips, "
        f"{clips.frames} frames at {clips.fps:g} per second; at most {size(needed)}, "
        f"{size(free_bytes(writer.folder))} are free"
    )


def sized(cfg: Encode, geometry: "Geometry", own: "Clips") -> "Clips":
    """Rate, length and sizes of the clips: the pipeline's own, replaced by fps=, frames= and buckets= if given."""
    if cfg.frames and not geometry.takes_frames(cfg.frames):
        raise ConfigError(
            f"frames={cfg.frames}: wanted {geometry.frame_stride} k + 1, for example {geometry.below(cfg.frames)}"
        )
    buckets = tuple(parse_buckets(cfg.buckets)) or own.buckets
    if not all(geometry.takes(height, width) for height, width in buckets):
        example = ",".join(f"{height}x{width}" for height, width in own.buckets)
        raise ConfigError(
            f"buckets={cfg.buckets}: wanted HEIGHTxWIDTH, multiples of {geometry.step}, for example [{example}]"
        )
    return replace(own, fps=cfg.fps or own.fps, frames=cfg.frames or own.frames, buckets=buckets)


def place(cfg: Encode) -> tuple[int, int]:
    """Return (rank, number of ranks) from the configuration, else from torchrun's environment."""
    if cfg.ranks:
        return cfg.rank, cfg.ranks
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def load_encoders(cfg: Encode, rank: int):
    import torch

    from fastlightgen.engine.local import pick_device
    from fastlightgen.parallel.threads import set_threads
    from fastlightgen.pipelines.encoders import Encoders

    set_threads(cfg.threads)
    device = pick_device(cfg.device)
    if device.type == "cuda":  # one GPU per rank of this host
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return Encoders(cfg.pipeline, device, getattr(torch, cfg.dtype), cfg.tiling, first_frame=cfg.first_frame)


def make_parts(cfg: Encode, writer, encoders, rows: Sequence[Row], numbers: Sequence[int], read: Read) -> None:
    """Write the unfinished parts among `numbers`: worker processes decode ahead, this process encodes."""
    from fastlightgen.parallel.log import bar

    unfinished = []
    with bar(len(numbers), "checking finished parts", cfg.progress) as progress:
        for number in numbers:
            unfinished += [] if writer.done(number) else [number]
            progress.update()
    total = sum(len(writer.parts[number]) for number in unfinished)
    clips = decoded([rows[i] for number in unfinished for i in writer.parts[number]], cfg.workers, read)
    lost = 0
    with bar(total, "encoding", cfg.progress, unit="clip") as progress:
        for number in unfinished:
            made, skipped = [], []
            for i in writer.parts[number]:
                clip = next(clips)
                if isinstance(clip, Skip):
                    record = {"row": i, "file": rows[i].name, "reason": clip.reason}
                    skipped.append(record | ({"frames": clip.frames} if clip.frames else {}))
                    lost += 1
                    progress.total = total - lost  # the bar counts encoded clips
                    progress.set_postfix_str(f"{lost} skipped", refresh=False)
                    continue
                frames, source = clip
                fields = encoders.clip(frames, rows[i].caption)
                fields = stored(fields, cfg.save_dtype, encoders.family.cond.text_fields)
                made.append((fields, about(rows[i], source, frames)))
                progress.update()
            writer.write_part(number, made, skipped)


def about(row: Row, source: str, frames: NDArray) -> dict:
    """The origin of a clip, for its shard's metadata."""
    size = list(frames.shape[1:3])
    times = {"start": row.start, "end": row.end}
    return {"file": row.name, "source": source, "caption": row.caption, **times, "resolution": size}


def read_row(row: Row, fps: float, frames: int, buckets: Sequence[tuple[int, int]], stride: int) -> Clip:
    """Read a row's clip; `stride`: frames per latent frame, of which a clip has a whole number and one frame more."""
    try:
        return read_clip(row, fps, frames, buckets), source_hash(row.file)
    except TooShort as err:
        possible = (err.frames - 1) // stride * stride + 1
        return Skip(f"{err}; frames={possible} takes it", possible) if possible > 1 else Skip(str(err))
    except Unusable as err:
        return Skip(str(err))


def decoded(rows: Sequence[Row], workers: int, read: Read) -> Iterator[Clip]:
    """Yield read(row) for every row, in order; a video that crashes its worker process costs only its own row."""
    if not workers:
        yield from map(read, rows)
        return
    left = deque(rows)
    while left:
        try:
            for result in ahead(list(left), workers, read):
                left.popleft()
                yield result
        except BrokenProcessPool:
            # One of the rows being read crashed a worker, but which is unknown: read the first alone, then go on.
            row = left.popleft()
            try:
                yield from ahead([row], 1, read)
            except BrokenProcessPool:
                yield Skip("crashes the decoder")


def ahead(rows: Sequence[Row], workers: int, read: Read) -> Iterator[Clip]:
    """Yield read(row) for every row, in order, from worker processes; at most two rows per worker are in memory."""
    # spawn, because a fork of a process with CUDA and threads can deadlock.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=follow_parent)
    try:
        waiting = deque(pool.submit(read, row) for row in rows[: 2 * workers])
        for row in [*rows[2 * workers :], *[None] * len(waiting)]:  # None: nothing left to submit
            yield waiting.popleft().result()
            if row is not None:
                waiting.append(pool.submit(read, row))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def follow_parent() -> None:
    """Prepare a worker: ignore Ctrl-C, which the parent handles, and exit if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def stored(fields: dict, save_dtype: str, text_fields: Sequence[str]) -> dict:
    """Cast latents and images to `save_dtype`; texts keep the type they were computed in, as their range is wider."""
    import torch

    kind = getattr(torch, save_dtype)
    out = {k: v if k in text_fields or not v.is_floating_point() else v.to(kind) for k, v in fields.items()}
    if bad := [k for k, v in out.items() if not torch.isfinite(v).all()]:
        raise ValueError(f"save_dtype={save_dtype}: {bad[0]} has numbers too large for it; use save_dtype=bfloat16")
    return out


def clip_bytes(encoders, area: int, frames: int, cfg: Encode) -> int:
    """The largest size of a clip on disk in bytes: its latents and images, and its text at full length."""
    numbers, text = encoders.numbers(area, frames)
    wide = {"float32": 4}  # bytes per number; the other types take 2
    return numbers * wide.get(cfg.save_dtype, 2) + text * wide.get(cfg.dtype, 2)


if __name__ == "__main__":
    main(encode, "encode")
