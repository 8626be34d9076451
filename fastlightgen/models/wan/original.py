"""The format of the original Wan2.1 repository: config.json and the keys of the checkpoint."""

from collections.abc import Mapping
from typing import Any

from fastlightgen.models.keys import Format
from fastlightgen.models.wan.keys import wan_table
from fastlightgen.models.wan.layers import TEXT_TOKENS

IMAGE_DIM = 1280  # width of CLIP ViT-H, a constant in the original code


def read(values: Mapping) -> dict[str, Any]:
    """Further diffusers fields: `model_type` i2v means that the network reads an image embedding."""
    if values["model_type"] not in ("t2v", "i2v"):
        raise ValueError(f"config.json: model_type is {values['model_type']!r}; only 't2v' and 'i2v' are supported")
    return {"image_dim": IMAGE_DIM, "added_kv_proj_dim": values["dim"]} if values["model_type"] == "i2v" else {}


def write(config: Mapping) -> dict[str, Any]:
    """Further original fields: the model type, and the fixed length of the text."""
    image = config["image_dim"]
    if image not in (None, IMAGE_DIM):
        raise ValueError(
            f"{ORIGINAL.network}: image_dim is {image}; the original network's is {IMAGE_DIM}; leave original= out"
        )
    return {"model_type": "t2v" if image is None else "i2v", "text_len": TEXT_TOKENS}


ORIGINAL = Format(
    network="WanModel",
    keys=wan_table,
    lists={"blocks": "blocks"},
    same={
        "patch_size": "patch_size",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "text_dim": "text_dim",
        "num_heads": "num_attention_heads",
        "num_layers": "num_layers",
        "cross_attn_norm": "cross_attn_norm",
        "eps": "eps",
    },
    width="dim",
    heads="num_heads",
    defaults={"model_type": "t2v", "dim": 2048, "ffn_dim": 8192, "num_heads": 16, "num_layers": 32},
    fixed={"text_len": TEXT_TOKENS, "qk_norm": True, "window_size": [-1, -1]},
    read=read,
    write=write,
)
