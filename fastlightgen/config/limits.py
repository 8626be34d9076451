"""The largest numbers that keys accept: beyond what anyone needs, below what fills a memory or never ends."""

import re

from fastlightgen.config.fields import ConfigError, clipped

MOST_CLIPS = 100_000  # also batches, shards, ranks
MOST_STEPS = 10_000  # of a sampler
MOST_FRAMES, MOST_FPS = 10_000, 1_000
MOST_SIDE = 16_384  # pixels, or frames, in a size
MOST_THREADS, MOST_WORKERS = 1_024, 256
MOST_POINTS = 1_000  # students of a sweep


def sides(key: str, text: str) -> list[int]:
    """ "480x832x81" as [480, 832, 81]; [] if it is anything but whole numbers above 0 between x."""
    parts = [part.strip() for part in text.lower().split("x")]
    if not all(re.fullmatch("[0-9]*[1-9][0-9]*", part) for part in parts):
        return []
    if any(len(part) > 9 or int(part) > MOST_SIDE for part in parts):
        raise ConfigError(f"{key}={clipped(text)}: wanted numbers up to {MOST_SIDE}")
    return [int(part) for part in parts]


def parse_size(text: str) -> tuple[int, int, int]:
    """ "480x832x81" as (height, width, frames)."""
    numbers = sides("size", text)
    if len(numbers) != 3:
        raise ConfigError(f"size={clipped(text)}: wanted HEIGHTxWIDTHxFRAMES, for example 480x832x81")
    height, width, frames = numbers
    return height, width, frames
