"""The language of the built-in world: its classes, the sentence for each clip, and the tokens of a sentence.

B captions. The class indices of a clip are places in the lists below.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
KINDS = ("ball", "square", "cross")
DIRECTIONS = ("right", "down", "left", "up")  # clockwise on the screen: a quarter turn adds or subtracts 1
SPEEDS = ("slowly", "fast")
CHANGES = ("on", "stops", "clockwise", "counter", "back")

END = "<end>"
WORDS = (*"a moves then goes on stops turns back with".split(), END, *COLOURS, *KINDS, *DIRECTIONS, *SPEEDS)
TOKENS = 16
TEXT_DIM = 48  # 32 channels for the word, 16 for the position


class Statements(NamedTuple):
    """The class indices that a caption states; `caption(*statements)` is the caption."""

    colour: int
    kind: int
    direction: int
    speed: int
    change: int
    other: tuple[int, int] | None  # the companion's (colour, kind)


_GRAMMAR = re.compile(
    r"a (\w+) (\w+) moves (\w+) (\w+) then (goes on|stops|turns (?:back|{}))(?: with a (\w+) (\w+))?".format(
        "|".join(DIRECTIONS)
    )
)


def caption(
    colour: int, kind: int, direction: int, speed: int, change: int, other: tuple[int, int] | None = None
) -> str:
    """Return the caption for class indices; `other` is the companion's (colour, kind)."""
    turns = [f"turns {DIRECTIONS[(direction + 1) % 4]}", f"turns {DIRECTIONS[(direction - 1) % 4]}"]
    then = ["goes on", "stops", *turns, "turns back"][change]
    text = f"a {COLOURS[colour]} {KINDS[kind]} moves {DIRECTIONS[direction]} {SPEEDS[speed]} then {then}"
    return text if other is None else f"{text} with a {COLOURS[other[0]]} {KINDS[other[1]]}"


def parse(text: str) -> Statements:
    """Return the statements of a caption: the inverse of `caption`."""
    match = _GRAMMAR.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        colour, kind, direction, speed, then, *other = match.groups()
        d = DIRECTIONS.index(direction)
        # In the order of CHANGES. Captions name the new direction, so a clockwise turn reads differently for each `d`.
        changes = ["goes on", "stops", f"turns {DIRECTIONS[(d + 1) % 4]}", f"turns {DIRECTIONS[d - 1]}", "turns back"]
        companion = (COLOURS.index(other[0]), KINDS.index(other[1])) if other[0] else None
        change = changes.index(then)
        return Statements(COLOURS.index(colour), KINDS.index(kind), d, SPEEDS.index(speed), change, companion)
    except ValueError:  # also raised by index() for a word outside its list
        example = "a red ball moves right fast then turns up with a blue cross"
        raise ValueError(f"caption: got {text!r}, wanted a sentence like {example!r}") from None


def tokenise(captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode captions as tokens: (float32 [B,16,48], int64 lengths [B]). An end token closes every caption, also "".

    A token consists of a 32-channel word vector, a row of the Hadamard matrix, and a 16-channel one-hot position times
    4. Words are therefore orthogonal, and both parts have a root mean square of 1. Tokens beyond the length are zeros.
    """
    text = torch.zeros(len(captions), TOKENS, TEXT_DIM)
    lengths = torch.zeros(len(captions), dtype=torch.int64)
    for row, words in enumerate(c.split() + [END] for c in captions):
        unknown = [w for w in words if w not in WORDS]
        if unknown:
            known = " ".join(w for w in WORDS if w != END)
            raise ValueError(f"prompt: unknown word {unknown[0]!r}; this world knows: {known}")
        if len(words) > TOKENS:
            raise ValueError(f"prompt: got {len(words) - 1} words, wanted at most {TOKENS - 1}; shorten it")
        ids = torch.tensor([WORDS.index(w) + 1 for w in words])  # row 0 of the matrix, all ones, is no word
        lengths[row] = len(words)
        text[row, : len(words), :32] = _HADAMARD[ids]
        text[row, : len(words), 32:] = 4.0 * torch.eye(TOKENS)[: len(words)]
    return text, lengths


def pool(text: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """The mean token [B,48] of captions from `tokenise`, for networks that read a pooled text (HunyuanVideo)."""
    return text.sum(1) / length[:, None]


def _hadamard(n: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix [n, n], n a power of two: entries are +-1, rows are orthogonal."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


_HADAMARD = _hadamard(32)
