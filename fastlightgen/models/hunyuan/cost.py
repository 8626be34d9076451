"""The cost of HunyuanVideo's transformer, from its configuration alone; models/cost.py defines the terms and units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fastlightgen.models.config import KEPT_HEADS
from fastlightgen.models.cost import Block, Network, Saved, Work, attention, biased, float8, last_norm, linear
from fastlightgen.parallel.shares import Part

TIME = 256  # width of the sinusoids of time and guidance


@dataclass(frozen=True)
class Joint:
    """Sizes of blocks that work on image and text tokens together. Linear layers are (inputs, outputs).

    `rows`: modulations of the image, two where the given frame has its own.
    """

    cfg: Mapping
    latent: tuple[int, int, int]
    text: int  # text tokens in the blocks
    fused: bool
    part: Part
    rows: int = 1

    @property
    def head(self) -> int:
        return self.cfg["attention_head_dim"]

    @property
    def heads(self) -> int:
        return self.cfg.get(KEPT_HEADS) or self.cfg["num_attention_heads"]

    @property
    def dim(self) -> int:
        return self.cfg["num_attention_heads"] * self.head

    @property
    def width(self) -> int:
        """Width of q, k and v: D unless heads are pruned."""
        return self.heads * self.head

    @property
    def inner(self) -> int:
        return int(self.dim * self.cfg["mlp_ratio"])

    @property
    def patch(self) -> int:
        """Numbers of a channel per token."""
        return self.cfg["patch_size_t"] * self.cfg["patch_size"] ** 2

    @property
    def all_tokens(self) -> int:
        """Image tokens of the clip."""
        return math.prod(self.latent) // self.patch

    @property
    def tokens(self) -> int:
        """Image tokens on this GPU."""
        return round(self.part.share * self.all_tokens)

    @property
    def both(self) -> int:
        return self.tokens + self.text

    @property
    def scores(self) -> int:
        """Joint attention over all tokens; a GPU of several computes some of the heads."""
        return attention(self.all_tokens + self.text, self.all_tokens + self.text, self.width) // self.part.ranks

    @property
    def fed(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.dim, self.inner), (self.inner, self.dim)

    @property
    def ends(self) -> tuple[int, int]:
        """Numbers per token at the network's input and output."""
        return self.cfg["in_channels"] * self.patch, self.cfg["out_channels"] * self.patch

    def block(
        self, kind: str, params: int, layers: tuple, mods: tuple, work: int, modulation: int, saved: Saved, inners: int
    ) -> Block:
        hidden, attended = self.both * self.dim, self.both * self.width
        return Block(
            kind=kind,
            params=params,
            weights=sum(a * b for a, b in (*layers, *mods)),
            widths=sum(map(sum, (*layers, *mods))),
            float8=float8(*layers),
            shared=Work(work, self.scores),  # the text enters before the blocks: nothing of a block is private
            private=Work(),
            prompt=Work(modulation),
            self_attention=self.scores,
            attention_out=Saved(attended, self.heads * self.both),  # the output, one log-sum-exp per head and token
            # The feed-forward before and after GELU; the log-sum-exp.
            saved=saved + Saved(2 * self.both * self.inner, self.heads * self.both),
            prompt_saved=Saved(0, 0),
            working=(5 if kind == "double" else 3) * hidden + inners * self.both * self.inner,
            gradients=hidden + self.both * self.inner,
        )

    def double(self) -> Block:
        into, out = (self.dim, self.width), (self.width, self.dim)  # q, k or v; the output
        layers = (*[into] * 3, out, *self.fed)  # a block has them for the image and the text
        six = (self.dim, 6 * self.dim)  # modulations: shifts, scales and gates
        hidden, attended, text = self.both * self.dim, self.both * self.width, self.text * self.width
        return self.block(
            "double",
            2 * biased(*layers, six) + 4 * self.head,  # with the RMS norms of q and k, of image and text
            (*layers, *layers),
            (six, six),
            linear(self.both, *layers),
            linear(self.rows + 1, six),
            # The text's q and k go through torch's own norms: 4 float32 tensors of the text instead of 2 narrow ones.
            Saved(6 * hidden + 6 * attended - 2 * text, 4 * text)
            if self.fused
            else Saved(4 * hidden + 4 * attended, 4 * hidden + 4 * attended),
            inners=2,
        )

    def single(self) -> Block:
        dim, width, inner = self.dim, self.width, self.inner
        layers = (*[(dim, width)] * 3, (dim, inner), (width + inner, dim))  # q, k, v; the MLP; one output for both
        three, hidden, attended = (dim, 3 * dim), self.both * dim, self.both * width
        return self.block(
            "single",
            biased(*layers, three) + 2 * self.head,  # with the RMS norms of q and k
            layers,
            (three,),
            linear(self.both, *layers),
            linear(self.rows, three),
            Saved(3 * hidden + 7 * attended, 0)
            if self.fused
            else Saved(2 * hidden + 5 * attended, 2 * hidden + 4 * attended),
            inners=3,
        )

    @property
    def refiner(self) -> tuple[tuple[int, int], ...]:
        """The linear layers of a refiner block; the factor of its feed-forward is 4 for every mlp_ratio."""
        dim = self.dim
        return (*[(dim, dim)] * 4, (dim, 4 * dim), (4 * dim, dim))

    def refiner_params(self) -> int:
        """Parameters of the refiner: embeddings of time and mean text, input layer, blocks with two LayerNorms each."""
        dim, count = self.dim, self.cfg["num_refiner_layers"]
        square, wide = (dim, dim), (self.cfg["text_embed_dim"], dim)
        blocks = count * (biased(*self.refiner, (dim, 2 * dim)) + 4 * dim)
        return biased((TIME, dim), square, wide, square, wide) + blocks

    def refiner_work(self, text: int) -> Work:
        """The refiner on `text` tokens, with its embeddings of time and of the mean text."""
        dim, count = self.dim, self.cfg["num_refiner_layers"]
        square, wide = (dim, dim), (self.cfg["text_embed_dim"], dim)
        return Work(
            linear(2, square) + count * (linear(text, *self.refiner) + linear(1, (dim, 2 * dim))),
            count * attention(text, text, dim),
            linear(1, (TIME, dim)) + linear(text + 1, wide),
        )

    def refiner_saved(self, text: int) -> int:
        """Elements kept of the refiner: per block 10 hidden tensors, and its feed-forward before and after SiLU."""
        return text * (self.cfg["text_embed_dim"] + self.cfg["num_refiner_layers"] * 18 * self.dim)

    def network(self, family: str, blocks: tuple[Block, ...], outside: int, text: Work, text_saved: int) -> Network:
        """The cost of a network with these blocks. `outside`: parameters beside the refiner's and those of the ends."""
        dim, tokens, (inputs, outputs) = self.dim, self.tokens, self.ends
        return Network(
            family=family,
            blocks=blocks,
            outside_params=outside + self.refiner_params() + biased((inputs, dim), (dim, 2 * dim), (dim, outputs)),
            tables=Work(),
            text=text,
            embed=Work(entry=linear(tokens, (inputs, dim))),
            unembed=Work(linear(1, (dim, 2 * dim)) + linear(tokens, (dim, outputs))),
            hidden=self.both * dim,
            width=dim,
            heads=self.heads,
            # Input and prediction, and the text. The reference operators keep the rotation of every token.
            saved=Saved(tokens * (inputs + outputs) + text_saved, 0 if self.fused else tokens * self.head),
            last=last_norm(tokens * dim, self.fused),
            merges=False,
            latent=self.latent,
            text_hidden=self.text * dim,
        )


def hunyuan(cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part) -> Network:
    """The cost of HunyuanVideoTransformer3DModel; `text`: number of text tokens.

    Its double and then its single blocks work on image and text tokens together.
    """
    rows = 2 if cfg["image_condition_type"] == "token_replace" else 1  # the given frame has its own modulation
    sizes = Joint(cfg, latent, text, fused, part, rows)
    dim = sizes.dim
    time, square, pooled = (TIME, dim), (dim, dim), (cfg["pooled_projection_dim"], dim)
    times = 1 + bool(cfg["guidance_embeds"])  # embedders of a scalar: time, guidance
    embeddings = times + rows - 1  # embeddings of a scalar per prompt; one more for t = 0 of the given frame
    # Embeddings of time, guidance and pooled text, of two layers each.
    vectors = Work(linear(embeddings + rows, square), entry=linear(embeddings, time) + linear(rows, pooled))
    blocks = (sizes.double(),) * cfg["num_layers"] + (sizes.single(),) * cfg["num_single_layers"]
    outside = biased(pooled, square, *[time, square] * times)
    return sizes.network("hunyuan", blocks, outside, vectors + sizes.refiner_work(text), sizes.refiner_saved(text))
