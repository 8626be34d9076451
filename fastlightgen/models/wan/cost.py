"""What Wan2.1's transformer costs, from its configuration alone; see models/cost.py for what counts."""

import math
from collections.abc import Mapping

from fastlightgen.models.cost import Block, Network, Saved, Work, attention, biased, last_norm, linear
from fastlightgen.parallel.shares import Part


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
