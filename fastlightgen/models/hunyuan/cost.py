"""What HunyuanVideo's transformer costs, from its configuration alone; see models/cost.py for what counts."""

import math
from collections.abc import Mapping

from fastlightgen.models.cost import Block, Network, Saved, Work, attention, biased, last_norm, linear
from fastlightgen.parallel.shares import Part


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


def fed_refiner(dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The refiner's feed-forward is 4 wide whatever mlp_ratio says."""
    return (dim, 4 * dim), (4 * dim, dim)
