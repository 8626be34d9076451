"""The record of Wan2.2 TI2V, by which the rest of the program knows this family."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlightgen.models.base import Cond
from fastlightgen.models.family import Clips
from fastlightgen.models.wan.family import WAN
from fastlightgen.models.wan_ti2v.comfyui import COMFY
from fastlightgen.models.wan_ti2v.config import TI2VConfig, is_ti2v
from fastlightgen.models.wan_ti2v.cost import wan_ti2v
from fastlightgen.models.wan_ti2v.encoders import GEOMETRY, TI2VEncoding
from fastlightgen.models.wan_ti2v.model import TI2VModel, at_start, given_of
from fastlightgen.models.wan_ti2v.original import ORIGINAL


def stock_inputs(cfg: TI2VConfig, x_t: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
    """Arguments of diffusers' WanTransformer3DModel: 1000 t of each token [B, L], 0 where the frame is given."""
    frames, rows, columns = (n // p for n, p in zip(x_t.shape[2:], cfg.patch_size, strict=True))
    times = (1000 * t)[:, None].repeat(1, frames)
    if cond.image is not None:
        given = given_of(cond.image)
        x_t, times[:, 0] = at_start(given, cond.image[:, 1:, :1], x_t), torch.where(given, 0, times[:, 0])
    return {
        "hidden_states": x_t,
        "timestep": times.repeat_interleave(rows * columns, 1),
        "encoder_hidden_states": cond.text,
    }


WAN_TI2V = replace(
    WAN,
    name="wan-ti2v",
    title="Wan2.2 TI2V",
    config=TI2VConfig,
    network=TI2VModel,
    owns=is_ti2v,
    cost=wan_ti2v,
    signs={},  # its keys are Wan's
    original=ORIGINAL,
    geometry=GEOMETRY,
    clips=Clips(fps=24, frames=121, buckets=((704, 1280), (1280, 704))),
    pipelines={"WanPipeline": None, "WanImageToVideoPipeline": True},
    encoding=TI2VEncoding,
    stock_inputs=stock_inputs,
    comfy=COMFY,
    vae_memory=(2.82e9, 1.43e9),
)
