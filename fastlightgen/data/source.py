"""Where batches come from: the built-in world or a folder of latent shards; both are functions of the step alone."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastlightgen.data import synthetic
from fastlightgen.data.cache import Cache
from fastlightgen.data.codec import Codec, condition
from fastlightgen.models.base import Cond
from fastlightgen.rng import generator


@dataclass
class Batch:
    """B clips: clean latents [B, C, F, H, W], their condition, and the same condition with the null prompt."""

    x0: Tensor
    cond: Cond
    null: Cond

    def to(self, device: torch.device) -> "Batch":
        moved: dict[int, Tensor] = {}  # what cond and null share stays shared: a walk merges their streams by it

        def move(x: Tensor) -> Tensor:
            if id(x) not in moved:
                moved[id(x)] = x.to(device)
            return moved[id(x)]

        return Batch(move(self.x0), self.cond.map(move), self.null.map(move))

    def drop_text(self, dropped: Tensor) -> Cond:
        """The condition with the null prompt where `dropped` [B] is true (trains the null prediction of Eq. 9)."""
        dropped, out = dropped.to(self.x0.device), {}
        for name in ("text", "text_len", "pooled"):
            given, blank = getattr(self.cond, name), getattr(self.null, name)
            if given is not None:
                out[name] = torch.where(dropped.view(-1, *[1] * (given.dim() - 1)), blank, given)
        return replace(self.cond, **out)


class Source(Protocol):
    """`batch(step, size)` draws training clips, `held_out(start, size)` fixed clips that training never sees."""

    name: str

    def batch(self, step: int, size: int) -> Batch: ...

    def held_out(self, start: int, size: int) -> Batch: ...


class ShapesSource:
    """Clips of the built-in world, drawn as they are needed."""

    name = "shapes"

    def __init__(self, seed: int):
        self.train, self.test = (synthetic.Shapes(seed=seed, split=s) for s in synthetic.SPLITS)

    def batch(self, step: int, size: int) -> Batch:
        return shapes_batch(self.train.batch(range(step * size, (step + 1) * size)))

    def held_out(self, start: int, size: int) -> Batch:
        return shapes_batch(self.test.batch(range(start, start + size)))


def shapes_batch(clips: synthetic.Clips) -> Batch:
    """Rendered clips -> latents, captions and first frames as a network reads them."""
    x0 = Codec().encode(clips.video)
    image = condition(x0, clips.has_first)
    text, length = synthetic.tokenise(clips.captions)
    null, null_length = synthetic.tokenise([""])
    prompt = Cond(text, length, image, pooled=synthetic.pool(text, length))
    blank = null.expand_as(text), null_length.expand_as(length)
    return Batch(x0, prompt, Cond(*blank, image, pooled=synthetic.pool(*blank)))


class CacheSource:
    """Clips of a latent cache; the last tenth (at least one clip) is held out."""

    def __init__(self, cache: Cache, seed: int):
        self.cache, self.seed, self.name = cache, seed, cache.digest
        self.cut = len(cache) - max(1, len(cache) // 10)
        if self.cut < 1:
            raise ValueError(f"data={cache.folder}: {len(cache)} clips; at least 2 are needed, one of them held out")

    def batch(self, step: int, size: int) -> Batch:
        """Epochs in seeded random orders, cut into batches without a break between epochs."""
        places = range(step * size, (step + 1) * size)
        orders = {e: self._order(e) for e in {p // self.cut for p in places}}
        return self._read([orders[p // self.cut][p % self.cut] for p in places])

    def held_out(self, start: int, size: int) -> Batch:
        rest = len(self.cache) - self.cut
        return self._read([self.cut + (start + i) % rest for i in range(size)])

    def _order(self, epoch: int) -> list[int]:
        return torch.randperm(self.cut, generator=generator(self.seed, epoch)).tolist()

    def _read(self, indices: list[int]) -> Batch:
        clips = self.cache.read(indices)
        x0 = clips.pop("latents")
        cond = Cond(**clips)
        null = replace(cond, **{k: v.expand_as(getattr(cond, k)) for k, v in self.cache.null.items()})
        return Batch(x0, cond, null)


def open_source(data: str, seed: int) -> Source:
    """`shapes`, or the folder of a latent cache."""
    if data == "shapes":
        return ShapesSource(seed)
    if (Path(data) / "index.json").is_file():
        return CacheSource(Cache(data), seed)
    raise ValueError(f"data={data}: neither `shapes` nor a folder with a latent cache (no index.json in it)")
