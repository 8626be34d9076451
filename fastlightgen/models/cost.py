"""The cost of a network, from its configuration alone: parameters, operations, tensors kept for a backward pass.

A multiply and an add of a matrix product count as two operations, as in torch's FlopCounterMode; norms, activations and
sums are not counted. All numbers are per sample. L image tokens, T text tokens, I image embedding tokens, D hidden.
When several GPUs split a clip's tokens (`Part`), the numbers are for one GPU: it has a part of the image tokens, all
text tokens, and the attention of some of the heads over all tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastlightgen.parallel.shares import WHOLE, Part


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass, split by the cost of their backward pass."""

    linear: float = 0  # matrix products; the backward pass has two for each: gradients of the input and of the weight
    attention: float = 0  # q k^T and its product with v; the backward pass has five products for these two
    entry: float = 0  # matrix products on input data, which needs no gradient: one product in the backward pass

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
    """Number of elements that autograd keeps for the backward pass."""

    narrow: float  # elements in the compute type
    wide: float  # elements in float32

    def __add__(self, other: "Saved") -> "Saved":
        return Saved(self.narrow + other.narrow, self.wide + other.wide)

    def bytes(self, size: int) -> float:
        """Memory in bytes; `size`: bytes per element of the compute type."""
        return self.narrow * size + self.wide * 4


@dataclass(frozen=True)
class Block:
    """The cost of one skippable block."""

    kind: str
    params: int
    weights: int  # elements of its weight matrices
    widths: int  # sum of inputs + outputs of its linear layers: LoRA adapters of rank r have r x widths parameters
    shared: Work  # the part before the text enters: once for a group of streams, whatever their prompts
    private: Work  # the rest of the block, once per prompt
    prompt: Work  # reading a prompt (`Block.read`), once per prompt; checkpointing does not repeat it
    self_attention: float  # operations that checkpointing does not repeat if the attention output is kept
    attention_out: Saved  # kept in addition in that case
    saved: Saved  # kept by the block without checkpointing
    prompt_saved: Saved  # kept per prompt, with and without checkpointing
    working: float  # peak number of elements alive without a graph, the block's input and output included
    gradients: float  # peak number of elements of activation gradients in its backward pass
    float8: int = 0  # bytes of the float8 copies of its weights, with their scales (fp8=frozen)


@dataclass(frozen=True)
class Network:
    """The cost of a network at one latent size."""

    family: str
    blocks: tuple[Block, ...]
    outside_params: int  # parameters outside the blocks
    tables: Work  # once per walk: the time embedding
    text: Work  # once per prompt
    embed: Work  # once per start state
    unembed: Work  # once per prediction
    hidden: int  # elements of a hidden state, [tokens, D]
    width: int  # D
    heads: int
    saved: Saved  # kept outside the blocks: input, positions, prompt, prediction
    last: Saved  # kept for the last norm; freed before the backward pass reaches the blocks
    merges: bool  # True if predictions with different prompts start from the same hidden state
    latent: tuple[int, int, int]  # (F, H, W)
    text_hidden: int = 0  # elements of a hidden state that belong to text tokens
    source: tuple = ()  # the function that computed this cost, and its arguments without the last one, `part`
    part: Part = WHOLE

    @property
    def config(self) -> Mapping:
        """The configuration that this is the cost of."""
        return self.source[1]

    def of(self, config: Mapping) -> "Network":
        """The cost of a network of the same family with another configuration, in the same place."""
        make, _, *given = self.source
        return replace(make(config, *given, self.part), source=(make, config, *given), part=self.part)

    def divided(self, part: Part) -> "Network":
        """The cost on one GPU of several that split a clip's tokens."""
        make, *given = self.source
        return replace(make(*given, part), source=self.source, part=part)

    @property
    def params(self) -> int:
        return self.outside_params + sum(b.params for b in self.blocks)

    def prune(self, keep: Sequence[int]) -> "Network":
        return replace(self, blocks=tuple(self.blocks[i] for i in sorted(keep)))

    def adapters(self, rank: int) -> int:
        """Number of parameters of LoRA adapters on every linear layer of the blocks."""
        return rank * sum(b.widths for b in self.blocks)


def attention(queries: int, keys: int, dim: int) -> int:
    """Operations of q k^T and of its product with v; `dim`: heads x head_dim."""
    return 4 * queries * keys * dim


def linear(tokens: int, *widths: tuple[int, int]) -> int:
    """Operations of linear layers (inputs, outputs) on `tokens` rows."""
    return sum(2 * tokens * a * b for a, b in widths)


def biased(*widths: tuple[int, int]) -> int:
    """Parameters of linear layers with bias."""
    return sum(a * b + b for a, b in widths)


def float8(*widths: tuple[int, int]) -> int:
    """Bytes of the weights of linear layers in float8, with a float32 scale per output; other sizes stay out."""
    return sum(a * b + 4 * b for a, b in widths if a % 16 == b % 16 == 0)


def last_norm(hidden: int, fused: bool) -> Saved:
    """Kept for the last norm: its input and output. The reference operator keeps two float32 tensors instead of one."""
    return Saved(2 * hidden, 0) if fused else Saved(hidden, 2 * hidden)
