"""Key tables: where each tensor of diffusers' format stands in the original repositories' checkpoints, and back.

One entry per tensor of the exact configuration, no substring replaces. Where the original keeps several tensors of
diffusers as one, an entry names rows of it. `Format` adds how the two configurations correspond.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

WEIGHT_BIAS = ("weight", "bias")


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: all of the tensor `key`, or these (start, stop) rows of it, one below the other."""

    key: str
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Rows start:stop of an original tensor are the rows of the tensor `key` from `offset` on; stop None: all."""

    key: str
    start: int = 0
    stop: int | None = None
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of the tensor `key`."""
        return tensor if self.stop is None else tensor[self.offset : self.offset + self.stop - self.start]


Table = dict[str, Source]


def nothing(config: Mapping) -> dict[str, Any]:
    """No further keys."""
    return {}


@dataclass(frozen=True)
class Format:
    """An original repository's network class beside diffusers' class for the same network."""

    network: str  # `_class_name` of its config.json
    keys: Callable[[Mapping], Table]  # diffusers configuration -> key table
    lists: dict[str, str]  # its lists of blocks, as LoRA files name them, and diffusers' names for them
    same: dict[str, str]  # original field -> diffusers field with the same values
    width: str  # original field for heads x head_dim
    heads: str
    defaults: dict[str, Any]  # what the original class takes where config.json says nothing
    fixed: dict[str, Any]  # original fields that are supported with this value only
    read: Callable[[Mapping], dict[str, Any]] = nothing  # original values -> further fields of diffusers
    write: Callable[[Mapping], dict[str, Any]] = nothing  # diffusers configuration -> further original fields


def named(modules: Mapping[str, str], ours: str = "", theirs: str = "", leaves=WEIGHT_BIAS) -> dict[str, str]:
    """{"a": "b"} as {"a.weight": "b.weight", "a.bias": "b.bias"}, behind a prefix on either side."""
    return {f"{ours}{a}.{leaf}": f"{theirs}{b}.{leaf}" for a, b in modules.items() for leaf in leaves}


def fused(ours: list[str], theirs: str, heights: list[int]) -> Table:
    """Entries of linear layers that the original keeps as one, with `heights` outputs each."""
    out: Table = {}
    start = 0
    for module, height in zip(ours, heights, strict=True):
        for leaf in WEIGHT_BIAS:
            out[f"{module}.{leaf}"] = Source(f"{theirs}.{leaf}", ((start, start + height),))
        start += height
    return out


def inverse(table: Table) -> dict[str, list[Piece]]:
    """Original key -> the tensors that it is made of, from its first row to its last."""
    out: dict[str, list[Piece]] = {}
    for key, source in table.items():
        pieces, offset = out.setdefault(source.key, []), 0
        if not source.rows:
            pieces.append(Piece(key))
        for start, stop in source.rows:
            pieces.append(Piece(key, start, stop, offset))
            offset += stop - start
    return {key: sorted(pieces, key=lambda p: p.start) for key, pieces in out.items()}
