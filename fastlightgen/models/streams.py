"""What travels through a walk: conditions, streams, hidden states; and how an engine finds the tensors in it.

Shapes: hidden states x, y [B, L, D].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fastlightgen.ops import Rope, add_residual, attend
from fastlightgen.parallel.sequence import Cut


@dataclass(frozen=True, eq=False)
class Cond:
    """What a prediction is conditioned on, as batched tensors. `image` holds the condition channels.

    A family that needs more makes a subclass with further fields.
    """

    text_fields: ClassVar[tuple[str, ...]] = ("text", "text_len", "pooled")  # they come from the prompt

    text: Tensor
    text_len: Tensor | None = None
    image: Tensor | None = None
    image_embeds: Tensor | None = None
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    kept: dict | None = None  # an empty dict, for one text under frozen weights: Wan keeps its keys and values here

    def map(self, fn) -> "Cond":
        """Apply fn to every tensor."""
        return replace(self, **{k: fn(v) for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True, eq=False)
class Stream:
    """One prediction of a walk. `keep`: indices of the blocks that run (None: all of them)."""

    cond: Cond
    keep: Sequence[int] | None = None
    grad: bool = False


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a walk reads of one condition; a family adds its own."""

    cond: Cond
    text: Tensor  # [B, T, D]


@dataclass(frozen=True, eq=False)
class Tables:
    """What all blocks and streams of a walk share; a family adds its own."""

    rope: Rope  # cosine and sine per frame, row and column (`rope_factors`)
    grid: tuple[int, int, int]  # patches along (F, H, W)
    cut: Cut | None = field(default=None, kw_only=True)  # where ranks share the tokens: rope and grid are of this part

    def part(self, cut: Cut) -> "Tables":
        """Those of this rank's part of the latent."""
        rope = Rope(cut.along(table, 0) if axis == cut.axis else table for axis, table in enumerate(self.rope))
        return replace(self, rope=rope, grid=tuple(map(len, rope)), cut=cut)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention among all tokens of the latent, wherever they are."""
        return attend(q, k, v, mask) if self.cut is None else self.cut.attend(q, k, v, mask)

    @property
    def tokens(self) -> int:
        """The image tokens that attention sees."""
        return math.prod(self.grid) if self.cut is None else sum(self.cut.tokens)


class State(NamedTuple):
    """Hidden states [B, L, D] as a block leaves them: x + gate y, with the sum left to whatever runs next.

    Tokens with a modulation of their own (Hunyuan's text) are a sequence of their own, which travels in `others`.
    """

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    others: tuple = ()

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.x, self.y, self.gate

    def settled(self) -> "State":
        """The same with the sum taken, once for both sides of a fork."""
        x = self.x if self.y is None else add_residual(self.x, self.y, self.gate)
        return State(x, others=tuple(s.settled() for s in self.others))

    def detach(self) -> "State":
        parts = (None if v is None else v.detach() for v in self.parts())
        return State(*parts, tuple(s.detach() for s in self.others))


@dataclass(frozen=True, eq=False)
class Job:
    """One group of streams in one block: a state, and the prompts it goes on with (several only until text enters)."""

    state: State
    prompts: list[Prompt]
    grads: list[bool]


@dataclass(eq=False)
class Made:
    """Where a block leaves its states, when its call returns their tensors alone."""

    states: Any = None


def tensors_of(value: Any) -> list[Tensor]:
    """The distinct tensors in nested lists, tuples and dataclasses; a Cond is the caller's and stays as it is."""
    out: dict[int, Tensor] = {}
    collect(value, out)
    return list(out.values())


def collect(value: Any, out: dict[int, Tensor]) -> None:
    # No inner function: one that calls itself is a reference cycle, which would hold tensors until Python looks for it.
    if isinstance(value, Tensor):
        out[id(value)] = value
    elif isinstance(value, list | tuple):
        for item in value:
            collect(item, out)
    elif is_dataclass(value) and not isinstance(value, Cond):
        for f in fields(value):
            collect(getattr(value, f.name), out)


def with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    """`value` with the tensors that `tensors_of` found replaced, in order; what was shared stays shared."""
    old = tensors_of(value)
    if all(a is b for a, b in zip(old, tensors, strict=True)):
        return value
    return rebuilt(value, {id(a): b for a, b in zip(old, tensors, strict=True)})


def rebuilt(value: Any, done: dict[int, Any]) -> Any:
    if id(value) not in done:
        if isinstance(value, State):
            done[id(value)] = State(*(rebuilt(v, done) for v in value))
        elif isinstance(value, list | tuple):
            done[id(value)] = type(value)(rebuilt(v, done) for v in value)
        elif is_dataclass(value) and not isinstance(value, Cond):
            done[id(value)] = replace(value, **{f.name: rebuilt(getattr(value, f.name), done) for f in fields(value)})
        else:
            return value
    return done[id(value)]
