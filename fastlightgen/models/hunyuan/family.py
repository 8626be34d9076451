"""The record of HunyuanVideo, by which the rest of the program knows this family."""

from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.base import Cond
from fastlightgen.models.family import Clips, Family
from fastlightgen.models.hunyuan.comfyui import COMFY
from fastlightgen.models.hunyuan.cost import hunyuan
from fastlightgen.models.hunyuan.encoders import GEOMETRY, TEXT_TOKENS, HunyuanEncoding
from fastlightgen.models.hunyuan.layers import HunyuanConfig
from fastlightgen.models.hunyuan.model import HunyuanModel
from fastlightgen.models.hunyuan.original import ORIGINAL

# NEGATIVE_PROMPT and NEGATIVE_PROMPT_I2V in hyvideo/constants.py of HunyuanVideo and HunyuanVideo-I2V, whose commands
# read them only where classifier-free guidance is switched on.
NEGATIVE = (
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)
NEGATIVE_I2V = "deformation, a poor composition and deformed video, bad teeth, bad eyes, bad limbs"


def stock_inputs(cfg: HunyuanConfig, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
    """Arguments of diffusers' HunyuanVideoTransformer3DModel, which takes 1000 t and 1000 times the guidance."""
    x = x_t
    if cond.image is not None:
        replaced = cfg.image_condition_type == "token_replace"  # the picture replaces frame 0
        x = torch.cat([cond.image[:, :, :1], x_t[:, :, 1:]], 2) if replaced else torch.cat([x_t, cond.image], 1)
    tokens = torch.arange(cond.text.shape[1], device=cond.text.device)
    length = torch.full((len(x),), len(tokens), device=x.device) if cond.text_len is None else cond.text_len
    return {
        "hidden_states": x,
        "timestep": t * 1000,
        "encoder_hidden_states": cond.text,
        "encoder_attention_mask": (tokens < length[:, None]).to(cond.text.dtype),
        "pooled_projections": cond.pooled,
        "guidance": None if cond.guidance is None else cond.guidance * 1000,
    }


HUNYUAN = Family(
    name="hunyuan",
    title="HunyuanVideo",
    config=HunyuanConfig,
    network=HunyuanModel,
    lists={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    cost=hunyuan,
    text_tokens=TEXT_TOKENS,
    signs={"context_embedder.token_refiner.": "diffusers", "txt_in.individual_token_refiner.": "original"},
    original=ORIGINAL,
    geometry=GEOMETRY,
    clips=Clips(fps=24, frames=129, buckets=((720, 1280), (1280, 720))),
    pipelines={"HunyuanVideoPipeline": False, "HunyuanVideoImageToVideoPipeline": True},
    negatives={"HunyuanVideoPipeline": NEGATIVE, "HunyuanVideoImageToVideoPipeline": NEGATIVE_I2V},
    encoding=HunyuanEncoding,
    interface=(
        "in_channels",
        "out_channels",
        "patch_size",
        "text_embed_dim",
        "pooled_projection_dim",
        "image_condition_type",
        "guidance_embeds",
    ),
    stock_inputs=stock_inputs,
    sets_sigmas=True,
    cfg_argument="true_cfg_scale",
    comfy=COMFY,
    vae_memory=(0.99e9, 5.14e9),
)
