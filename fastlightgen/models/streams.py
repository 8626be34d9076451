"""The data of a walk: conditions, streams, prompts, tables, hidden states.

Shapes: hidden states x, y [B, L, D].
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from fastlightgen.ops import Rope, add_residual, attend
from fastlightgen.parallel.sequence import Cut

TextKeys = dict[nn.Module, tuple[Tensor, Tensor]]  # block -> keys and values of one text, [1, T, heads, head_dim]

Watch = Callable[[Tensor, Tensor, Tensor | None], None]  # queries, keys [B, L, heads, head_dim], mask

# A family's own subclass of each.
AnyCond = TypeVar("AnyCond", bound="Cond")
AnyPrompt = TypeVar("AnyPrompt", bound="Prompt")
AnyTables = TypeVar("AnyTables", bound="Tables")


@dataclass(frozen=True, eq=False)
class Cond:
    """The conditions of a prediction, as batched tensors. `image` holds the condition channels.

    A family that needs more conditions adds fields in a subclass.
    """

    text_fields: ClassVar[tuple[str, ...]] = ("text", "text_len", "pooled")  # fields that come from the prompt

    text: Tensor
    text_len: Tensor | None = None
    image: Tensor | None = None
    image_embeds: Tensor | None = None
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    def map(self: AnyCond, fn: Callable[[Tensor], Tensor]) -> AnyCond:
        """Apply fn to every tensor."""
        return replace(self, **{k: fn(v) for k, v in vars(self).items() if isinstance(v, Tensor)})


class Features(dict[int, Tensor]):
    """Hidden states [B, L, D] of a stream's image tokens after some blocks, by block; a walk fills it."""

    def __init__(self, blocks: Iterable[int]):
        super().__init__()
        self.blocks = tuple(blocks)  # among those that the stream runs


@dataclass(frozen=True, eq=False)
class Stream:
    """One prediction of a walk.

    `text_keys` caches keys and values of a text that never changes under frozen weights (the null prompt of a frozen
    teacher). Give every walk the same dict, empty at first: Wan fills it in the first walk and reads it afterwards.
    """

    cond: Cond
    keep: Sequence[int] | None = None  # indices of the blocks that run; None: all of them
    grad: bool = False
    text_keys: TextKeys | None = None
    features: Features | None = None  # hidden states to keep


@dataclass(frozen=True, eq=False)
class Prompt:
    """A condition as the blocks read it; a family adds its own fields."""

    cond: Cond
    text: Tensor  # [B, T, D]
    text_keys: TextKeys | None = field(default=None, kw_only=True)  # the cache of its streams (see `Stream`)


@dataclass(frozen=True, eq=False)
class Tables:
    """Tensors that all blocks and streams of a walk share; a family adds its own fields."""

    rope: Rope  # cosine and sine per frame, row and column (`rope_factors`)
    grid: tuple[int, int, int]  # patches along (F, H, W)
    cut: Cut | None = field(default=None, kw_only=True)  # this process's part, which rope and grid describe; None: all
    watch: Watch | None = field(default=None, kw_only=True)  # see VideoDiT.watch

    def part(self: AnyTables, cut: Cut) -> AnyTables:
        """The tables of this process's part of the latent."""
        rope = Rope(cut.along(table, 0) if axis == cut.axis else table for axis, table in enumerate(self.rope))
        frames, rows, columns = map(len, rope)
        return replace(self, rope=rope, grid=(frames, rows, columns), cut=cut)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention among all tokens of the latent, those of other processes included."""
        if self.watch is not None:
            self.watch(q, k, mask)
        return attend(q, k, v, mask) if self.cut is None else self.cut.attend(q, k, v, mask)

    @property
    def tokens(self) -> int:
        """Number of image tokens that attention sees."""
        return math.prod(self.grid) if self.cut is None else sum(self.cut.tokens)


class State(NamedTuple):
    """Hidden states [B, L, D] with a deferred residual: x + gate y. The next block adds it in one kernel with its norm.

    Tokens with their own modulation (HunyuanVideo's text) form a separate sequence, kept in `others`.
    """

    x: Tensor
    y: Tensor | None = None
    gate: Tensor | None = None
    others: tuple["State", ...] = ()

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.x, self.y, self.gate

    def settled(self) -> "State":
        """The same hidden states with the residual added."""
        x = self.x if self.y is None else add_residual(self.x, self.y, self.gate)
        return State(x, others=tuple(s.settled() for s in self.others))

    def detach(self) -> "State":
        y, gate = (None if v is None else v.detach() for v in (self.y, self.gate))
        return State(self.x.detach(), y, gate, tuple(s.detach() for s in self.others))


@dataclass(frozen=True)
class Prunable:
    """Rows of a block's linear layers that width pruning drops together: a head, or a neuron of a feed-forward.

    All names are those of modules of the block.
    """

    kind: str  # heads or ffn
    rows: Mapping[str, str]  # linear layer whose rows are dropped -> the module whose first argument is its input
    columns: Mapping[str, int]  # linear layer that reads these rows -> the first of its columns that does
    size: int = 1  # rows of a layer that are one unit
    norms: Mapping[str, str] = field(default_factory=dict)  # RMS norm over all rows of a linear layer -> that layer


@dataclass(frozen=True, eq=False)
class Job(Generic[AnyPrompt]):
    """One group of streams in one block: their common state, and the prompts that they read there."""

    state: State
    prompts: list[AnyPrompt]  # more than one only in the first block that reads the text
    grads: list[bool]  # per prompt: True if a stream with it carries gradient
