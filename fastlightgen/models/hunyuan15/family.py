"""The record of HunyuanVideo-1.5, by which the rest of the program knows this family."""

from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.base import Cond
from fastlightgen.models.family import Clips, Family
from fastlightgen.models.hunyuan15.comfyui import COMFY
from fastlightgen.models.hunyuan15.config import Hunyuan15Cond, Hunyuan15Config
from fastlightgen.models.hunyuan15.cost import hunyuan15
from fastlightgen.models.hunyuan15.encoders import GEOMETRY, TEXT_TOKENS, Hunyuan15Encoding
from fastlightgen.models.hunyuan15.model import Hunyuan15Model, full
from fastlightgen.models.hunyuan15.original import ORIGINAL


def stock_inputs(cfg: Hunyuan15Config, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
    """Arguments of diffusers' HunyuanVideo15Transformer3DModel: zeros stand for an absent picture, 1000 t for t."""
    cond, size = full(cond), len(x_t)
    image = x_t.new_zeros(size, cfg.extra_channels, *x_t.shape[2:]) if cond.image is None else cond.image
    glyphs = x_t.new_zeros(size, 1, cfg.text_embed_2_dim) if cond.text_2 is None else cond.text_2
    shown = x_t.new_zeros(size, 1, cfg.image_embed_dim) if cond.image_embeds is None else cond.image_embeds

    def valid(text: Tensor, lengths: Tensor | None) -> Tensor:
        tokens = torch.arange(text.shape[1], device=text.device)
        lengths = torch.full((size,), len(tokens), device=text.device) if lengths is None else lengths
        return (tokens < lengths.expand(size)[:, None]).to(text.dtype)

    return {
        "hidden_states": torch.cat([x_t, image.to(x_t.dtype)], 1),
        "timestep": t * 1000,
        "encoder_hidden_states": cond.text,
        "encoder_attention_mask": valid(cond.text, cond.text_len),
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": 0 * valid(glyphs, None) if cond.text_2 is None else valid(glyphs, cond.text_2_len),
        "image_embeds": shown,
    }


HUNYUAN15 = Family(
    name="hunyuan15",
    title="HunyuanVideo-1.5",
    config=Hunyuan15Config,
    network=Hunyuan15Model,
    lists={"transformer_blocks": "num_layers"},
    cost=hunyuan15,
    text_tokens=TEXT_TOKENS,
    cond=Hunyuan15Cond,
    signs={"context_embedder_2.": "diffusers", "byt5_in.": "original"},
    original=ORIGINAL,
    geometry=GEOMETRY,
    clips=Clips(fps=24, frames=121, buckets=((480, 848), (848, 480))),
    pipelines={"HunyuanVideo15Pipeline": False, "HunyuanVideo15ImageToVideoPipeline": True},
    encoding=Hunyuan15Encoding,
    interface=(
        "in_channels",
        "out_channels",
        "patch_size",
        "text_embed_dim",
        "text_embed_2_dim",
        "image_embed_dim",
        "task_type",
    ),
    stock_inputs=stock_inputs,
    sets_sigmas=True,
    cfg_argument="guidance_scale",
    guider="guider",
    sized=frozenset({"HunyuanVideo15ImageToVideoPipeline"}),
    comfy=COMFY,
    vae_memory=(5.04e9, 24.2e9),
    tiled_frames=121,
)
