"""What a network costs, from its configuration alone: parameters, operations, tensors kept for a backward pass.

A multiply and add of a matrix product counts as two operations, as in torch's FlopCounterMode; norms, activations and
sums are not counted. Everything is per sample. L image tokens, T text tokens, I tokens of an embedded image, D hidden.
Of several GPUs that share a clip's tokens (`Part`) each has some image tokens, its heads' attention, and all the text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fastlightgen.models.shares import WHOLE, Part


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
    shared: Work  # what streams that differ only in their prompts share as long as no text has entered
    private: Work  # the rest of the block, once per prompt
    prompt: Work  # what it makes of a prompt before it sees the hidden states; not computed again by checkpointing
    self_attention: float  # operations that keeping the attention output saves a recomputation
    attention_out: Saved  # what that keeps
    saved: Saved  # kept by the block where nothing is computed again
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
    last: Saved  # the last norm's share, given back before the backward pass comes to the blocks
    merges: bool  # do predictions with different prompts start from one hidden state?
    latent: tuple[int, int, int]
    text_hidden: int = 0  # elements of a hidden state that are the text's
    source: tuple = ()  # the arguments of `network` that it is made of

    def divided(self, part: Part) -> "Network":
        return network(*self.source, part)

    @property
    def params(self) -> int:
        return self.outside_params + sum(b.params for b in self.blocks)

    def prune(self, keep: Sequence[int]) -> "Network":
        return replace(self, blocks=tuple(self.blocks[i] for i in sorted(keep)))

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on every linear layer of the blocks."""
        return rank * sum(b.widths for b in self.blocks)


def latent_size(height: int, width: int, frames: int) -> tuple[int, int, int]:
    """(F, H, W) of the latent of a clip: both families' VAEs compress 4 x 8 x 8 and keep the first frame."""
    for name, got, step in (("height", height, 16), ("width", width, 16)):
        if got < step or got % step:
            raise ValueError(f"size: {name} is {got}; wanted a multiple of {step} (VAE 8, patch 2), for example 480")
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"size: {frames} frames; wanted 4 n + 1, for example {max(1, frames // 4 * 4 + 1)}")
    return (frames - 1) // 4 + 1, height // 8, width // 8


def network(
    config: Mapping, latent: tuple[int, int, int], text_tokens: int = 0, fused: bool = True, part: Part = WHOLE
) -> Network:
    """The cost of the network that a diffusers config.json describes; text_tokens 0: what its family is used with.

    `fused`: with the kernels of a GPU, which keep their inputs; the CPU's reference operators are torch's own, which
    keep what lies between them too, much of it in float32.
    """
    name = config.get("_class_name", "WanTransformer3DModel")
    if name not in FAMILIES:
        raise ValueError(f"config.json: _class_name is {name!r}; wanted one of {', '.join(FAMILIES)}")
    make, tokens = FAMILIES[name]
    try:
        net = make(config, latent, text_tokens or tokens, fused, part)
        return replace(net, source=(config, latent, text_tokens, fused))
    except KeyError as err:
        raise ValueError(f"config.json: {err.args[0]} is missing; wanted a {name} configuration of diffusers") from None


def attention(queries: int, keys: int, dim: int) -> int:
    return 4 * queries * keys * dim


def linear(tokens: int, *widths: tuple[int, int]) -> int:
    """Operations of linear layers (inputs, outputs) on `tokens` rows."""
    return sum(2 * tokens * a * b for a, b in widths)


def biased(*widths: tuple[int, int]) -> int:
    """Parameters of linear layers with bias."""
    return sum(a * b + b for a, b in widths)


def wan(cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part) -> Network:
    """WanTransformer3DModel; the image embedding of image-to-video has 257 tokens."""
    heads, patch = cfg["num_attention_heads"], math.prod(cfg["patch_size"])
    dim, ffn, image_dim = heads * cfg["attention_head_dim"], cfg["ffn_dim"], cfg["image_dim"]
    whole = math.prod(latent) // patch
    tokens = round(part.share * whole)
    image = 0 if image_dim is None else 257
    square, fed = (dim, dim), ((dim, ffn), (ffn, dim))
    added = (square, square) if image else ()
    layers = (*[square] * 8, *added, *fed)
    hidden, context = tokens * dim, (text + image) * dim
    block = Block(
        kind="block",
        params=biased(*layers) + 4 * dim + (dim if image else 0) + (2 * dim if cfg["cross_attn_norm"] else 0) + 6 * dim,
        weights=sum(a * b for a, b in layers),
        widths=sum(map(sum, layers)),
        shared=Work(linear(tokens, *[square] * 5), attention(whole, whole, dim) // part.ranks),
        private=Work(linear(tokens, square, *fed), attention(tokens, text + image, dim)),
        prompt=Work(linear(text + image, square, square)),
        self_attention=attention(whole, whole, dim) // part.ranks,
        attention_out=Saved(hidden, heads * tokens),
        # Fused, 18 hidden tensors: x and y of the two gated norms and x of the third, their three results, q and k
        # before and after norm and rotation, v, the output; in the cross-attention q after its norm and the output,
        # and of that norm, which is torch's own, 2 in float32. Reference, 22, of them 10 in float32 inside the norms.
        # Image tokens add 2. Then the feed-forward before and after GELU, and rows of statistics.
        saved=Saved(
            ((16 if fused else 12) + 2 * bool(image)) * hidden + 2 * tokens * ffn,
            (2 if fused else 10) * hidden + (2 + bool(image)) * heads * tokens,
        ),
        prompt_saved=Saved(2 * context, 2 * context),
        working=7 * hidden + 2 * tokens * ffn,
        gradients=hidden + tokens * ffn,
    )
    inputs, outputs = cfg["in_channels"] * patch, cfg["out_channels"] * patch
    embedder = ((image_dim, image_dim), (image_dim, dim)) if image else ()
    time, texts = ((cfg["freq_dim"], dim), square), ((cfg["text_dim"], dim), square)
    outside = biased((inputs, dim), *time, (dim, 6 * dim), *texts, *embedder, (dim, outputs)) + 2 * dim
    return Network(
        family="wan",
        blocks=(block,) * cfg["num_layers"],
        outside_params=outside + (2 * image_dim + 2 * dim if image else 0),
        tables=Work(linear(1, square, (dim, 6 * dim)), entry=linear(1, time[0])),
        text=Work(linear(text, square) + linear(image, *embedder), entry=linear(text, texts[0])),
        embed=Work(entry=linear(tokens, (inputs, dim))),
        unembed=Work(linear(tokens, (dim, outputs))),
        hidden=hidden,
        heads=heads,
        saved=Saved(
            tokens * (inputs + outputs) + text * (cfg["text_dim"] + 3 * dim) + image * (4 * (image_dim or 0) + 3 * dim),
            0 if fused else tokens * cfg["attention_head_dim"],  # rotations of every token
        ),
        last=last_norm(hidden, fused),
        merges=True,
        latent=latent,
    )


def hunyuan(cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part) -> Network:
    """HunyuanVideoTransformer3DModel: double blocks, then single ones, over image and text tokens together."""
    heads, patch = cfg["num_attention_heads"], cfg["patch_size_t"] * cfg["patch_size"] ** 2
    dim = heads * cfg["attention_head_dim"]
    inner, head = int(dim * cfg["mlp_ratio"]), cfg["attention_head_dim"]
    whole = math.prod(latent) // patch
    tokens = round(part.share * whole)
    both, square, fed = tokens + text, (dim, dim), ((dim, inner), (inner, dim))
    rows = 2 if cfg["image_condition_type"] == "token_replace" else 1  # the given frame has a modulation of its own
    scores, hidden = attention(whole + text, whole + text, dim) // part.ranks, both * dim

    def block(kind: str, params: int, layers: tuple, work: int, modulation: int, saved: Saved, inners: int) -> Block:
        return Block(
            kind=kind,
            params=params,
            weights=sum(a * b for a, b in layers),
            widths=sum(map(sum, layers)),
            shared=Work(work, scores),
            private=Work(),
            prompt=Work(modulation),
            self_attention=scores,
            attention_out=Saved(hidden, heads * both),
            saved=saved + Saved(2 * both * inner, heads * both),
            prompt_saved=Saved(0, 0),
            working=(5 if kind == "double" else 3) * hidden + inners * both * inner,
            gradients=hidden + both * inner,
        )

    streams = (*[square] * 4, *fed)  # of the image, and again of the text
    six, three = (dim, 6 * dim), (dim, 3 * dim)
    double = block(
        "double",
        2 * biased(*streams, six) + 4 * head,
        (*streams, *streams, six, six),
        linear(both, *streams),
        linear(rows + 1, six),
        # Of the text's norms of q and k, which are torch's own, 4 tensors in float32 take the place of 2.
        Saved(12 * hidden - 2 * text * dim, 4 * text * dim) if fused else Saved(8 * hidden, 8 * hidden),
        inners=2,
    )
    flat = (*[square] * 3, (dim, inner), (dim + inner, dim))
    single = block(
        "single",
        biased(*flat, three) + 2 * head,
        (*flat, three),
        linear(both, *flat),
        linear(rows, three),
        Saved(10 * hidden, 0) if fused else Saved(7 * hidden, 6 * hidden),
        inners=3,
    )
    inputs, outputs = cfg["in_channels"] * patch, cfg["out_channels"] * patch
    time, pooled, wide = (256, dim), (cfg["pooled_projection_dim"], dim), (cfg["text_embed_dim"], dim)
    times = 1 + bool(cfg["guidance_embeds"])
    refiner = (*[square] * 4, *fed_refiner(dim))
    count = cfg["num_refiner_layers"]
    outside = (
        biased((inputs, dim), pooled, square, *[time, square] * times, (dim, 2 * dim), (dim, outputs))
        + biased(time, square, wide, square, wide)  # the refiner's embedding of time and mean text, and its input
        + count * (biased(*refiner, (dim, 2 * dim)) + 4 * dim)
    )
    embeddings = times + rows - 1  # with the embedding of t = 0 for the given frame
    return Network(
        family="hunyuan",
        blocks=(double,) * cfg["num_layers"] + (single,) * cfg["num_single_layers"],
        outside_params=outside,
        tables=Work(),
        text=Work(
            linear(embeddings + rows + 2, square) + count * (linear(text, *refiner) + linear(1, (dim, 2 * dim))),
            count * attention(text, text, dim),
            linear(embeddings + 1, time) + linear(rows, pooled) + linear(text + 1, wide),
        ),
        embed=Work(entry=linear(tokens, (inputs, dim))),
        unembed=Work(linear(1, (dim, 2 * dim)) + linear(tokens, (dim, outputs))),
        hidden=hidden,
        heads=heads,
        saved=Saved(
            tokens * (inputs + outputs) + text * (wide[0] + count * (10 * dim + 8 * dim)), 0 if fused else tokens * head
        ),
        last=last_norm(tokens * dim, fused),
        merges=False,
        latent=latent,
        text_hidden=text * dim,
    )


def last_norm(hidden: int, fused: bool) -> Saved:
    """Its input and its output; reference: in float32 also what lies between the norm and the modulation."""
    return Saved(2 * hidden, 0) if fused else Saved(hidden, 2 * hidden)


def fed_refiner(dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The refiner's feed-forward is 4 wide whatever mlp_ratio says."""
    return (dim, 4 * dim), (4 * dim, dim)


FAMILIES = {"WanTransformer3DModel": (wan, 512), "HunyuanVideoTransformer3DModel": (hunyuan, 256)}
