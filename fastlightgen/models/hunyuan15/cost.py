"""The cost of HunyuanVideo-1.5's transformer, from its configuration; models/cost.py defines the terms and units."""

from collections.abc import Mapping

from fastlightgen.models.cost import Network, Work, biased, linear
from fastlightgen.models.hunyuan.cost import TIME, Joint
from fastlightgen.models.hunyuan15.encoders import IMAGE_TOKENS
from fastlightgen.models.hunyuan15.layers import GLYPH_WIDTH
from fastlightgen.parallel.shares import Part


def hunyuan15(
    cfg: Mapping, latent: tuple[int, int, int], text: int, fused: bool, part: Part, picture: int = IMAGE_TOKENS
) -> Network:
    """The cost of HunyuanVideo15Transformer3DModel; `text`: number of the prompt's tokens.

    Image-to-video has `picture` tokens more. Prompts are planned without quoted words, whose tokens are few.
    """
    picture = picture if cfg["task_type"] == "i2v" else 0
    sizes = Joint(cfg, latent, text + picture, fused, part)
    dim, seen = sizes.dim, cfg["image_embed_dim"]
    time, square, glyph = (TIME, dim), (dim, dim), (cfg["text_embed_2_dim"], GLYPH_WIDTH)
    embedders = (time, square, glyph, (GLYPH_WIDTH, GLYPH_WIDTH), (GLYPH_WIDTH, dim), (seen, seen), (seen, dim))
    # With the LayerNorms of the embedders of glyphs and pictures, and the embeddings of three kinds of tokens.
    outside = biased(*embedders) + 2 * (cfg["text_embed_2_dim"] + seen + dim) + 3 * dim
    own = Work(linear(1, square) + linear(picture, (seen, dim)), entry=linear(1, time) + linear(picture, (seen, seen)))
    saved = sizes.refiner_saved(text) + picture * (4 * seen + 2 * dim)
    return sizes.network(
        "hunyuan15", (sizes.double(),) * cfg["num_layers"], outside, own + sizes.refiner_work(text), saved
    )
