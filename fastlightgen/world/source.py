"""Training batches of the built-in world, rendered on demand, and `open_source`, which opens any `data=`."""

import math
from pathlib import Path

from fastlightgen.data.cache import Cache
from fastlightgen.data.source import Batch, CacheSource, Source
from fastlightgen.models.base import Cond
from fastlightgen.world import captions, shapes
from fastlightgen.world.chance import SPLITS
from fastlightgen.world.codec import Codec, condition


class ShapesSource:
    """Clips of the built-in world, rendered on demand."""

    name = "shapes"
    description: dict = {"world": shapes.WORLD, "out_channels": Codec.channels}
    null_prompt = ""
    num_held_out = math.inf

    def __init__(self, seed: int):
        self.train, self.test = (shapes.Shapes(seed=seed, split=s) for s in SPLITS)

    def batch(self, step: int, size: int, rows: range | None = None) -> Batch:
        return shapes_batch(self.train.batch([step * size + row for row in rows or range(size)]))

    def held_out(self, start: int, size: int) -> Batch:
        return shapes_batch(self.test.batch(range(start, start + size)))

    def largest(self) -> Batch:
        return self.batch(0, 1)


def shapes_batch(clips: shapes.Clips) -> Batch:
    """Convert rendered clips to a batch: latents, text embeddings and first-frame conditions."""
    x0 = Codec().encode(clips.video)
    image = condition(x0, clips.has_first)
    text, length = captions.tokenise(clips.captions)
    null, null_length = captions.tokenise([""])
    prompt = Cond(text, length, image, pooled=captions.pool(text, length))
    blank = null.expand_as(text), null_length.expand_as(length)
    return Batch(x0, prompt, Cond(*blank, image, pooled=captions.pool(*blank)))


def open_source(data: str, seed: int, negative: str = "empty") -> Source:
    """Open `data`: the built-in world for "shapes", else the folder of a latent cache. `negative`: see CacheSource."""
    if data == "shapes" and negative == "official":
        raise ValueError("negative=official: the built-in world has no official negative prompt; leave negative= out")
    if data == "shapes":
        return ShapesSource(seed)
    if (Path(data) / "index.json").is_file():
        return CacheSource(Cache(data), seed, negative)
    raise ValueError(f"data={data}: neither `shapes` nor a folder with a latent cache (it has no index.json)")
