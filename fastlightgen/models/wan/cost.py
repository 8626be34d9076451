"""The cost of Wan2.1's transformer, from its configuration alone; models/cost.py defines the terms and units."""

import math
from collections.abc import Mapping

from fastlightgen.models.config import KEPT_HEADS
from fastlightgen.models.cost import Block, Network, Saved, Work, attention, biased, float8, last_norm, linear
from fastlightgen.parallel.shares import Part


def wan(cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part) -> Network:
    """The cost of WanTransformer3DModel; `text`: number of text tokens. Linear layers are (inputs, outputs)."""
    heads, patch = cfg.get(KEPT_HEADS) or cfg["num_attention_heads"], math.prod(cfg["patch_size"])
    dim, ffn, image_dim = cfg["num_attention_heads"] * cfg["attention_head_dim"], cfg["ffn_dim"], cfg["image_dim"]
    inner = heads * cfg["attention_head_dim"]  # width of q, k and v: D unless heads are pruned
    all_tokens = math.prod(latent) // patch  # tokens of the clip
    tokens = round(part.share * all_tokens)  # tokens on this GPU
    image = 0 if image_dim is None else 257  # tokens of CLIP's image embedding, the class token among them
    square, fed = (dim, dim), ((dim, ffn), (ffn, dim))
    into, out = (dim, inner), (inner, dim)  # q, k or v; the output
    added = (into, into) if image else ()  # keys and values of the image tokens
    layers = (*[into] * 6, out, out, *added, *fed)  # q, k, v and output of both attentions; feed-forward
    hidden, attended, context = tokens * dim, tokens * inner, (text + image) * inner
    block = Block(
        kind="block",
        # With RMS norms of q and k in both attentions, of the image keys, the LayerNorm, and scale_shift_table.
        params=biased(*layers) + (5 if image else 4) * inner + (8 if cfg["cross_attn_norm"] else 6) * dim,
        weights=sum(a * b for a, b in layers),
        widths=sum(map(sum, layers)),
        float8=float8(*layers),
        # Shared: self-attention (q, k, v, output) and the cross-attention's query. Private: the cross-attention and its
        # output layer, the feed-forward. Prompt: keys and values of the text and image tokens.
        shared=Work(linear(tokens, *[into] * 4, out), attention(all_tokens, all_tokens, inner) // part.ranks),
        private=Work(linear(tokens, out, *fed), attention(tokens, text + image, inner)),
        prompt=Work(linear(text + image, into, into)),
        self_attention=attention(all_tokens, all_tokens, inner) // part.ranks,
        attention_out=Saved(attended, heads * tokens),  # the output, and one log-sum-exp per head and token
        # Fused: 18 hidden tensors. 16 in the compute type: x and y of two gated norms and x of the third (5); results
        # of the three norms (3); in self-attention q and k before and after norm and rotation, v, the output (6); in
        # cross-attention q after its norm, and the output (2). 2 in float32: that norm of q, which is torch's own.
        # Those inside the attentions, 8 and 2, are as wide as the heads that are left.
        # Reference: 22 hidden tensors, 10 of them in float32 inside the norms; 6 and 6 are inside the attentions.
        # Image tokens add 2.
        # Both: the feed-forward before and after GELU, and one log-sum-exp per head and token of each attention.
        saved=Saved(
            (8 if fused else 6) * hidden + ((8 if fused else 6) + 2 * bool(image)) * attended + 2 * tokens * ffn,
            (0 if fused else 4) * hidden + (2 if fused else 6) * attended + (2 + bool(image)) * heads * tokens,
        ),
        prompt_saved=Saved(2 * context, 2 * context),
        working=7 * hidden + 2 * tokens * ffn,
        gradients=hidden + tokens * ffn,
    )
    inputs, outputs = cfg["in_channels"] * patch, cfg["out_channels"] * patch  # numbers per token
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
        width=dim,
        heads=heads,
        saved=Saved(
            tokens * (inputs + outputs) + text * (cfg["text_dim"] + 3 * dim) + image * (4 * (image_dim or 0) + 3 * dim),
            0 if fused else tokens * cfg["attention_head_dim"],  # the rotation of every token
        ),
        last=last_norm(hidden, fused),
        merges=True,
        latent=latent,
    )
