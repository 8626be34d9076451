"""The record of Wan2.1, by which the rest of the program knows this family."""

from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.base import Cond
from fastlightgen.models.family import Clips, Family
from fastlightgen.models.wan.comfyui import COMFY
from fastlightgen.models.wan.cost import wan
from fastlightgen.models.wan.encoders import GEOMETRY, WanEncoding
from fastlightgen.models.wan.keys import unused_keys
from fastlightgen.models.wan.layers import TEXT_TOKENS, WanConfig
from fastlightgen.models.wan.model import WanModel
from fastlightgen.models.wan.original import ORIGINAL

# sample_neg_prompt in wan/configs/shared_config.py of Wan2.1. In English: garish colours, overexposed, static, blurred
# details, subtitles, style, artwork, painting, picture, still, greyish overall, worst quality, low quality, JPEG
# artefacts, ugly, incomplete, extra fingers, badly drawn hands, badly drawn face, deformed, disfigured, malformed
# limbs, fused fingers, motionless picture, cluttered background, three legs, many people in the background, walking
# backwards.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，"
    "倒着走"
)


def stock_inputs(cfg: WanConfig, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
    """Arguments of diffusers' WanTransformer3DModel: 1000 t, and the latent and condition channels as one tensor."""
    return {
        "hidden_states": x_t if cond.image is None else torch.cat([x_t, cond.image], 1),
        "timestep": t * 1000,
        "encoder_hidden_states": cond.text,
        "encoder_hidden_states_image": cond.image_embeds,
    }


WAN = Family(
    name="wan",
    title="Wan",
    config=WanConfig,
    network=WanModel,
    lists={"blocks": "num_layers"},
    cost=wan,
    text_tokens=TEXT_TOKENS,
    signs={"condition_embedder.time_proj.": "diffusers", "time_projection.1.": "original"},
    original=ORIGINAL,
    unused=unused_keys,
    geometry=GEOMETRY,
    clips=Clips(fps=16, frames=81, buckets=((480, 832), (832, 480))),
    pipelines={"WanPipeline": False, "WanImageToVideoPipeline": True},
    negatives={"WanPipeline": NEGATIVE, "WanImageToVideoPipeline": NEGATIVE},
    encoding=WanEncoding,
    packages={"ftfy": "Wan's pipelines clean prompts with ftfy"},
    interface=("in_channels", "out_channels", "patch_size", "text_dim", "image_dim"),
    stock_inputs=stock_inputs,
    sets_sigmas=False,
    cfg_argument="guidance_scale",
    converted_shift=3.0,
    comfy=COMFY,
    vae_memory=(0.51e9, 1.27e9),
)
