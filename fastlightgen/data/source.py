"""Training batches: the interface of a source, and the source that draws from a latent cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen.data.cache import NEGATIVE, NULL, Cache
from fastlightgen.models.base import Cond
from fastlightgen.models.families import FAMILIES, cond_of
from fastlightgen.rng import generator


@dataclass
class Batch:
    """B clips: clean latents x0 [B, C, F, H, W], their condition, and that condition with the null prompt."""

    x0: Tensor
    cond: Cond
    null: Cond

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda x: x.to(device))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply fn to every tensor.

        Tensors shared by cond and null stay shared: the network then processes them once for both.
        """
        made: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in made:
                made[id(x)] = fn(x)
            return made[id(x)]

        return Batch(once(self.x0), self.cond.map(once), self.null.map(once))

    def with_guidance(self, scale: float) -> "Batch":
        """Return the same clips for networks that read a guidance scale."""
        guidance = torch.full((len(self.x0),), scale, device=self.x0.device)
        return Batch(self.x0, replace(self.cond, guidance=guidance), replace(self.null, guidance=guidance))

    def drop_text(self, dropped: Tensor) -> Cond:
        """Return the condition, with the null prompt where `dropped` [B] is true: trains v(null) of Eq. 9."""
        dropped, changed = dropped.to(self.x0.device), {}
        for key in self.cond.text_fields:
            cond, null = vars(self.cond)[key], vars(self.null)[key]
            if cond is not None:
                changed[key] = torch.where(dropped.view(-1, *[1] * (cond.dim() - 1)), null, cond)
        return replace(self.cond, **changed)


class Source(Protocol):
    """A source of batches that depend on the step alone, so that a resumed run draws the same ones.

    `batch(step, size)` draws training clips; `rows` selects a part of the batch. `held_out(start, size)` returns fixed
    clips that training never uses; after `num_held_out` of them they repeat. `largest()` returns one clip of the
    largest size. `description` records how the clips were encoded; that of the built-in world names its version,
    "world". `null_prompt` is the text of the null prompt.
    """

    name: str
    description: dict
    null_prompt: str
    num_held_out: float  # math.inf: no end

    def batch(self, step: int, size: int, rows: range | None = None) -> Batch: ...

    def held_out(self, start: int, size: int) -> Batch: ...

    def largest(self) -> Batch: ...


def shown_clips(cache: Cache, clips: Sequence[int]) -> dict[str, Any]:
    """Size and rate of clips of one size, for the card of a model; {} if the cache does not record them."""
    family, fps = FAMILIES.get(cache.description.get("family", "")), cache.description.get("fps")
    latent = cache.sizes[clips[0]] if clips else ()
    if family is None or not fps or len(latent) != 4:
        return {}
    return {"size": family.geometry.size(latent[1:]), "fps": fps}


class CacheSource:
    """Clips of a latent cache. All clips of a batch have the same size.

    Steps form cycles. A cycle contains, for every size, about as many batches as its clips fill, in a seeded random
    order. The last tenth of the clips of the most frequent size is held out.
    """

    def __init__(self, cache: Cache, seed: int, negative: str = "empty"):
        """`negative`: empty takes the cache's null prompt, official the negative prompt that it holds beside it."""
        self.null, self.null_prompt = cache.prompt(NEGATIVE if negative == "official" else NULL)
        self.cache, self.seed, self.name, self.description = cache, seed, cache.digest, cache.description
        self.groups, self.cond = cache.groups(), cond_of(cache.description)
        clips = self.groups[0] if self.groups else []
        if shown := shown_clips(cache, clips):
            self.description = cache.description | {"clips": shown}
        cut = len(clips) - max(1, len(clips) // 10)
        if cut < 1:
            raise ValueError(
                f"data={cache.folder}: {len(clips)} clips; at least 2 of equal size are needed, one of them held out"
            )
        self.groups[0], self.rest = clips[:cut], clips[cut:]
        self.num_held_out: float = len(self.rest)

    def batch(self, step: int, size: int, rows: range | None = None) -> Batch:
        """Draw a batch: the epochs of a size, each in its own seeded order, form a sequence that is cut in batches."""
        number, turn = self.turn(step, size)
        group = self.groups[number]
        places = [turn * size + row for row in rows or range(size)]  # positions in that sequence
        orders = {e: self._order(number, e) for e in {p // len(group) for p in places}}
        return self._read([group[orders[p // len(group)][p % len(group)]] for p in places])

    def turn(self, step: int, size: int) -> tuple[int, int]:
        """Return the number of the size that this step uses, and how many earlier steps used it."""
        shares = [max(1, round(len(group) / size)) for group in self.groups]  # batches per cycle
        labels = [number for number, share in enumerate(shares) for _ in range(share)]
        cycle, place = divmod(step, len(labels))
        order = torch.randperm(len(labels), generator=generator(self.seed, cycle, 0)).tolist()
        taken = [labels[i] for i in order[: place + 1]]
        return taken[-1], cycle * shares[taken[-1]] + taken.count(taken[-1]) - 1

    def held_out(self, start: int, size: int) -> Batch:
        return self._read([self.rest[(start + i) % len(self.rest)] for i in range(size)])  # repeats a short list

    def largest(self) -> Batch:
        return self._read([max(range(len(self.cache)), key=lambda i: math.prod(self.cache.sizes[i]))])

    def _order(self, number: int, epoch: int) -> list[int]:
        """The order of a size's clips in one epoch."""
        # Size 0 uses the epoch alone, so that a cache with one size is drawn by (seed, epoch).
        keys = (epoch, number) if number else (epoch,)
        return torch.randperm(len(self.groups[number]), generator=generator(self.seed, *keys)).tolist()

    def _read(self, indices: list[int]) -> Batch:
        clips: dict[str, Any] = {
            k: v.float() if v.is_floating_point() else v for k, v in self.cache.read(indices).items()
        }
        x0 = clips.pop("latents")
        cond = self.cond(**clips)
        # The null prompt replaces the text only; images and first frames stay those of the clip.
        null = {k: v.to(clips[k]).expand_as(clips[k]) for k, v in self.null.items()}
        return Batch(x0, cond, self.cond(**clips | null))
