"""What a network costs, from its configuration alone: parameters, operations, tensors kept for a backward pass.

A multiply and add of a matrix product counts as two operations, as in torch's FlopCounterMode; norms, activations and
sums are not counted. Everything is per sample. L image tokens, T text tokens, I tokens of an embedded image, D hidden.
Of several GPUs that share a clip's tokens (`Part`) each has some image tokens, its heads' attention, and all the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastlightgen.parallel.shares import Part


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass, by what their backward pass costs."""

    linear: float = 0  # matrix products: a backward makes two of each, for the input and for the weight
    attention: float = 0  # scores and their product with v: five products in the backward for two in the forward
    entry: float = 0  # matrix products on data, whose input needs no gradient

    def __add__(self, other: "Work") -> "Work":
        return Work(self.linear + other.linear, self.attention + other.attention, self.entry + other.entry)

    @property
    def forward(self) -> float:
        return self.linear + self.attention + self.entry

    @property
    def backward(self) -> float:
        return 2 * self.linear + 2.5 * self.attention + self.entry


@dataclass(frozen=True)
class Saved:
    """Tensors that autograd keeps of one block: elements in the compute type, and elements that stay float32."""

    narrow: float
    wide: float

    def __add__(self, other: "Saved") -> "Saved":
        return Saved(self.narrow + other.narrow, self.wide + other.wide)

    def bytes(self, size: int) -> float:
        return self.narrow * size + self.wide * 4


@dataclass(frozen=True)
class Block:
    """One skippable block."""

    kind: str
    params: int
    weights: int  # entries of its matrices
    widths: int  # inputs + outputs of its linear layers: a low-rank adapter of rank r has r times as many parameters
    shared: Work  # up to where the text enters: once for a group of streams, whatever their prompts
    private: Work  # the rest of the block, once per prompt
    prompt: Work  # reading a prompt, once per prompt; checkpointing does not compute it again
    self_attention: float  # operations that are not computed again if the attention output is kept
    attention_out: Saved  # kept in addition in that case
    saved: Saved  # kept by the block without checkpointing
    prompt_saved: Saved  # kept per prompt, with and without checkpointing
    working: float  # elements alive at its widest moment without a graph, states at its ends included
    gradients: float  # elements of gradients on their way at the widest moment of its backward pass


@dataclass(frozen=True)
class Network:
    """A network at one latent size."""

    family: str
    blocks: tuple[Block, ...]
    outside_params: int
    tables: Work  # once per walk: time
    text: Work  # once per prompt
    embed: Work  # once per start state
    unembed: Work  # once per prediction
    hidden: int  # elements of a hidden state, [tokens, D]
    heads: int
    saved: Saved  # kept for a backward pass outside the blocks: input, positions, prompt, prediction
    last: Saved  # kept for the last norm; freed before the backward pass reaches the blocks
    merges: bool  # do predictions with different prompts start from one hidden state?
    latent: tuple[int, int, int]
    text_hidden: int = 0  # elements of a hidden state that are the text's
    source: tuple = ()  # the function that made this network, and its arguments without the last one, `part`

    def divided(self, part: Part) -> "Network":
        make, *given = self.source
        return replace(make(*given, part), source=self.source)

    @property
    def params(self) -> int:
        return self.outside_params + sum(b.params for b in self.blocks)

    def prune(self, keep: Sequence[int]) -> "Network":
        return replace(self, blocks=tuple(self.blocks[i] for i in sorted(keep)))

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on every linear layer of the blocks."""
        return rank * sum(b.widths for b in self.blocks)


def attention(queries: int, keys: int, dim: int) -> int:
    return 4 * queries * keys * dim


def linear(tokens: int, *widths: tuple[int, int]) -> int:
    """Operations of linear layers (inputs, outputs) on `tokens` rows."""
    return sum(2 * tokens * a * b for a, b in widths)


def biased(*widths: tuple[int, int]) -> int:
    """Parameters of linear layers with bias."""
    return sum(a * b + b for a, b in widths)


def last_norm(hidden: int, fused: bool) -> Saved:
    """Its input and its output; reference: in float32 also what lies between the norm and the modulation."""
    return Saved(2 * hidden, 0) if fused else Saved(hidden, 2 * hidden)
