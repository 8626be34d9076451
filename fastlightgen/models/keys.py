"""Key tables: the place of each tensor of diffusers' format in an original repository's checkpoint, and the inverse.

A table has one entry per tensor of one exact configuration; no key is found by replacing substrings. Where the original
stores several of diffusers' tensors as one, an entry names rows of it. `Format` maps the configurations as well.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

WEIGHT_BIAS = ("weight", "bias")


@dataclass(frozen=True)
class Source:
    """The place of a tensor: the complete original tensor `key`, or its (start, stop) row ranges, concatenated."""

    key: str
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an original tensor: its rows start:stop equal the rows of `key` from `offset` on.

    `stop` None: the original tensor equals `key`.
    """

    key: str
    start: int = 0
    stop: int | None = None
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """Cut this piece out of `tensor`, the tensor named `key`."""
        return tensor if self.stop is None else tensor[self.offset : self.offset + self.stop - self.start]


Table = dict[str, Source]


def nothing(config: Mapping) -> dict[str, Any]:
    """Default of `Format.read` and `Format.write`: no further keys."""
    return {}


@dataclass(frozen=True)
class Format:
    """How an original repository names the weights and settings of a network that diffusers has too."""

    network: str  # `_class_name` of its config.json
    keys: Callable[[Mapping], Table]  # diffusers configuration -> key table
    lists: dict[str, str]  # block list in LoRA files for the original -> block list in diffusers
    same: dict[str, str]  # original field -> diffusers field with the same value
    width: str  # original field for heads x head_dim
    heads: str  # original field for the number of heads
    defaults: dict[str, Any]  # values of the original class for fields absent from config.json
    fixed: dict[str, Any]  # original fields with the only value that is supported
    files: tuple[str, ...] = ()  # names of its weight files, the preferred one first; loading tries diffusers' too
    read: Callable[[Mapping], dict[str, Any]] = nothing  # original values -> further fields of diffusers
    write: Callable[[Mapping], dict[str, Any]] = nothing  # diffusers configuration -> further original fields
    # Start of a key of the weights -> a value for `read`, true if there are such keys: what config.json does not tell.
    marks: Mapping[str, str] = field(default_factory=dict)
    boundary: Callable[[Mapping], float] | None = None  # of the released models with two experts of this network


def named(modules: Mapping[str, str], prefix: str = "", original: str = "", leaves=WEIGHT_BIAS) -> dict[str, str]:
    """Turn {"a": "b"} into {"a.weight": "b.weight", "a.bias": "b.bias"}.

    `prefix` goes before diffusers' keys, `original` before the original ones.
    """
    return {f"{prefix}{a}.{leaf}": f"{original}{b}.{leaf}" for a, b in modules.items() for leaf in leaves}


def fused(modules: list[str], original: str, heights: list[int]) -> Table:
    """Entries of linear layers that the original stores as one layer; `heights`: number of outputs of each."""
    out: Table = {}
    start = 0
    for module, height in zip(modules, heights, strict=True):
        for leaf in WEIGHT_BIAS:
            out[f"{module}.{leaf}"] = Source(f"{original}.{leaf}", ((start, start + height),))
        start += height
    return out


def inverse(table: Table) -> dict[str, list[Piece]]:
    """Original key -> the pieces that make up its tensor, from the first row to the last."""
    out: dict[str, list[Piece]] = {}
    for key, source in table.items():
        pieces, offset = out.setdefault(source.key, []), 0
        if not source.rows:
            pieces.append(Piece(key))
        for start, stop in source.rows:
            pieces.append(Piece(key, start, stop, offset))
            offset += stop - start
    return {key: sorted(pieces, key=lambda p: p.start) for key, pieces in out.items()}
