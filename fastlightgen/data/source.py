"""Where batches come from: what a source offers, and the clips of a latent cache, as a function of the step alone."""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlightgen.data.cache import Cache
from fastlightgen.models.base import Cond
from fastlightgen.models.families import cond_of
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
        dropped, changed = dropped.to(self.x0.device), {}
        for key in self.cond.text_fields:
            cond, null = vars(self.cond)[key], vars(self.null)[key]
            if cond is not None:
                changed[key] = torch.where(dropped.view(-1, *[1] * (cond.dim() - 1)), null, cond)
        return replace(self.cond, **changed)


class Source(Protocol):
    """`batch(step, size)` draws training clips (only `rows` of them, where given),
    `held_out(start, size)` fixed clips that training never sees.

    `largest` is one clip of the largest size. `description` says what the clips were made with; it is empty for the
    built-in world.
    """

    name: str
    description: dict

    def batch(self, step: int, size: int, rows: range | None = None) -> Batch: ...

    def held_out(self, start: int, size: int) -> Batch: ...

    def largest(self) -> Batch: ...


class CacheSource:
    """Clips of a latent cache. A batch has clips of one size; the last tenth of the most frequent size is held out.

    A round of steps takes from every size about as many batches as its clips fill, in a seeded random order.
    """

    def __init__(self, cache: Cache, seed: int):
        self.cache, self.seed, self.name, self.description = cache, seed, cache.digest, cache.description
        self.groups, self.cond = cache.groups(), cond_of(cache.description)
        clips = self.groups[0] if self.groups else []
        cut = len(clips) - max(1, len(clips) // 10)
        if cut < 1:
            raise ValueError(
                f"data={cache.folder}: {len(clips)} clips; at least 2 are needed (of one size), one of them held out"
            )
        self.groups[0], self.rest = clips[:cut], clips[cut:]

    def batch(self, step: int, size: int, rows: range | None = None) -> Batch:
        """Epochs of each size in seeded random orders, cut into batches without a break between epochs."""
        number, turn = self.turn(step, size)
        group = self.groups[number]
        places = [turn * size + row for row in rows or range(size)]
        orders = {e: self._order(number, e) for e in {p // len(group) for p in places}}
        return self._read([group[orders[p // len(group)][p % len(group)]] for p in places])

    def turn(self, step: int, size: int) -> tuple[int, int]:
        """Which size this step takes, and how many steps took it before."""
        shares = [max(1, round(len(group) / size)) for group in self.groups]
        labels = [number for number, share in enumerate(shares) for _ in range(share)]
        cycle, place = divmod(step, len(labels))
        order = torch.randperm(len(labels), generator=generator(self.seed, cycle, 0)).tolist()
        taken = [labels[i] for i in order[: place + 1]]
        return taken[-1], cycle * shares[taken[-1]] + taken.count(taken[-1]) - 1

    def held_out(self, start: int, size: int) -> Batch:
        return self._read([self.rest[(start + i) % len(self.rest)] for i in range(size)])

    def largest(self) -> Batch:
        return self._read([max(range(len(self.cache)), key=lambda i: math.prod(self.cache.sizes[i]))])

    def _order(self, number: int, epoch: int) -> list[int]:
        keys = (epoch, number) if number else (epoch,)
        return torch.randperm(len(self.groups[number]), generator=generator(self.seed, *keys)).tolist()

    def _read(self, indices: list[int]) -> Batch:
        clips: dict[str, Any] = {
            k: v.float() if v.is_floating_point() else v for k, v in self.cache.read(indices).items()
        }
        x0 = clips.pop("latents")
        cond = self.cond(**clips)
        null = {k: v.to(clips[k]).expand_as(clips[k]) for k, v in self.cache.null.items()}
        return Batch(x0, cond, self.cond(**clips | null))
