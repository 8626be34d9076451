"""The cost of HunyuanVideo's transformer, from its configuration alone; models/cost.py defines the terms and units."""

import math
from collections.abc import Mapping

from fastlightgen.models.config import KEPT_HEADS
from fastlightgen.models.cost import Block, Network, Saved, Work, attention, biased, float8, last_norm, linear
from fastlightgen.parallel.shares import Part


def hunyuan(cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part) -> Network:
    """The cost of HunyuanVideoTransformer3DModel; `text`: number of text tokens.

    Its double and then its single blocks work on image and text tokens together. Linear layers are (inputs, outputs).
    """
    heads, patch = cfg.get(KEPT_HEADS) or cfg["num_attention_heads"], cfg["patch_size_t"] * cfg["patch_size"] ** 2
    dim = cfg["num_attention_heads"] * cfg["attention_head_dim"]
    width = heads * cfg["attention_head_dim"]  # width of q, k and v: D unless heads are pruned
    inner, head = int(dim * cfg["mlp_ratio"]), cfg["attention_head_dim"]
    all_tokens = math.prod(latent) // patch  # image tokens of the clip
    tokens = round(part.share * all_tokens)  # image tokens on this GPU
    both, square, fed = tokens + text, (dim, dim), ((dim, inner), (inner, dim))
    into, out = (dim, width), (width, dim)  # q, k or v; the output
    rows = 2 if cfg["image_condition_type"] == "token_replace" else 1  # the given frame has its own modulation
    # Joint attention over all tokens; a GPU of several computes some of the heads.
    scores, hidden = attention(all_tokens + text, all_tokens + text, width) // part.ranks, both * dim
    attended = both * width

    def block(
        kind: str, params: int, layers: tuple, mods: tuple, work: int, modulation: int, saved: Saved, inners: int
    ) -> Block:
        return Block(
            kind=kind,
            params=params,
            weights=sum(a * b for a, b in (*layers, *mods)),
            widths=sum(map(sum, (*layers, *mods))),
            float8=float8(*layers),
            shared=Work(work, scores),  # the text enters before the blocks: nothing of a block is private
            private=Work(),
            prompt=Work(modulation),
            self_attention=scores,
            attention_out=Saved(attended, heads * both),  # the output, and one log-sum-exp per head and token
            saved=saved + Saved(2 * both * inner, heads * both),  # feed-forward before and after GELU; log-sum-exp
            prompt_saved=Saved(0, 0),
            working=(5 if kind == "double" else 3) * hidden + inners * both * inner,
            gradients=hidden + both * inner,
        )

    double_layers = (
        *[into] * 3,
        out,
        *fed,
    )  # q, k, v, output, feed-forward; a block has them for the image and the text
    six, three = (dim, 6 * dim), (dim, 3 * dim)  # modulations: shifts, scales and gates
    double = block(
        "double",
        2 * biased(*double_layers, six) + 4 * head,  # with the RMS norms of q and k, of image and text
        (*double_layers, *double_layers),
        (six, six),
        linear(both, *double_layers),
        linear(rows + 1, six),
        # The text's q and k go through torch's own norms: 4 float32 tensors of the text instead of 2 narrow ones.
        Saved(6 * hidden + 6 * attended - 2 * text * width, 4 * text * width)
        if fused
        else Saved(4 * hidden + 4 * attended, 4 * hidden + 4 * attended),
        inners=2,
    )
    single_layers = (*[into] * 3, (dim, inner), (width + inner, dim))  # q, k, v; the MLP; one output layer for both
    single = block(
        "single",
        biased(*single_layers, three) + 2 * head,  # with the RMS norms of q and k
        single_layers,
        (three,),
        linear(both, *single_layers),
        linear(rows, three),
        Saved(3 * hidden + 7 * attended, 0) if fused else Saved(2 * hidden + 5 * attended, 2 * hidden + 4 * attended),
        inners=3,
    )
    inputs, outputs = cfg["in_channels"] * patch, cfg["out_channels"] * patch  # numbers per token
    time, pooled, wide = (256, dim), (cfg["pooled_projection_dim"], dim), (cfg["text_embed_dim"], dim)
    times = 1 + bool(cfg["guidance_embeds"])  # embedders of a scalar: time, guidance
    refiner = (*[square] * 4, *fed_refiner(dim))
    count = cfg["num_refiner_layers"]
    outside = (
        biased((inputs, dim), pooled, square, *[time, square] * times, (dim, 2 * dim), (dim, outputs))
        + biased(time, square, wide, square, wide)  # the refiner: embeddings of time and mean text, input layer
        + count * (biased(*refiner, (dim, 2 * dim)) + 4 * dim)  # its blocks, with two LayerNorms each
    )
    embeddings = times + rows - 1  # embeddings of a scalar per prompt; one more for t = 0 of the given frame
    return Network(
        family="hunyuan",
        blocks=(double,) * cfg["num_layers"] + (single,) * cfg["num_single_layers"],
        outside_params=outside,
        tables=Work(),
        # Embeddings of time, guidance, pooled text and mean text (two layers each), then the refiner.
        text=Work(
            linear(embeddings + rows + 2, square) + count * (linear(text, *refiner) + linear(1, (dim, 2 * dim))),
            count * attention(text, text, dim),
            linear(embeddings + 1, time) + linear(rows, pooled) + linear(text + 1, wide),
        ),
        embed=Work(entry=linear(tokens, (inputs, dim))),
        unembed=Work(linear(1, (dim, 2 * dim)) + linear(tokens, (dim, outputs))),
        hidden=hidden,
        width=dim,
        heads=heads,
        # Input and prediction; per refiner block 10 hidden tensors of the text, and its feed-forward before and after
        # SiLU. The reference operators keep the rotation of every token.
        saved=Saved(
            tokens * (inputs + outputs) + text * (wide[0] + count * (10 * dim + 8 * dim)), 0 if fused else tokens * head
        ),
        last=last_norm(tokens * dim, fused),
        merges=False,
        latent=latent,
        text_hidden=text * dim,
    )


def fed_refiner(dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The linear layers of the refiner's feed-forward; their factor is 4 for every mlp_ratio, as in diffusers."""
    return (dim, 4 * dim), (4 * dim, dim)
