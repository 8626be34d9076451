"""Key tables: where each tensor of diffusers' format stands in the original repositories' checkpoints, and back.

One entry per tensor of the exact configuration, no substring replaces. Wan only renames. HunyuanVideo's original fuses
q, k, v (and the MLP of a single block) into one tensor, and its final modulation has shift before scale: such entries
name rows of the original.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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


Table = dict[str, Source]

# How the weights of each kind are told from the others, for the error about a folder that mixes two.
SIGNS = {
    "condition_embedder.time_proj.": "Wan (diffusers format)",
    "time_projection.1.": "Wan (original format)",
    "context_embedder.token_refiner.": "HunyuanVideo (diffusers format)",
    "txt_in.individual_token_refiner.": "HunyuanVideo (original format)",
    "down_blocks.": "a UNet",
    "decoder.": "a VAE",
    "encoder.": "an encoder",
}


def recognise(keys) -> str:
    """What network has such keys, in words; "" if it is none that is known."""
    return next((name for sign, name in SIGNS.items() if any(key.startswith(sign) for key in keys)), "")


def named(modules: Mapping[str, str], ours: str = "", theirs: str = "", leaves=WEIGHT_BIAS) -> dict[str, str]:
    """{"a": "b"} as {"a.weight": "b.weight", "a.bias": "b.bias"}, behind a prefix on either side."""
    return {f"{ours}{a}.{leaf}": f"{theirs}{b}.{leaf}" for a, b in modules.items() for leaf in leaves}


def fused(ours: list[str], theirs: str, heights: list[int]) -> Table:
    """Entries of linear layers that the original keeps as one, with `heights` outputs each."""
    out, start = {}, 0
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
