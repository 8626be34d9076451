"""The format of the original repositories of Wan2.1 and Wan2.2 A14B: config.json and the keys of the checkpoint."""

from collections.abc import Mapping
from typing import Any

from fastlightgen.models.keys import Format
from fastlightgen.models.wan.keys import wan_table
from fastlightgen.models.wan.layers import TEXT_TOKENS

IMAGE_DIM = 1280  # width of CLIP ViT-H, a constant in the original code
CLIP = "reads CLIP"


def read(values: Mapping) -> dict[str, Any]:
    """Further diffusers fields. A network with `model_type` i2v reads CLIP tokens in Wan2.1, and none in Wan2.2."""
    if values["model_type"] not in ("t2v", "i2v"):
        raise ValueError(f"config.json: model_type is {values['model_type']!r}; only 't2v' and 'i2v' are supported")
    embeds = values["model_type"] == "i2v" and values.get(CLIP, True)
    return {"image_dim": IMAGE_DIM, "added_kv_proj_dim": values["dim"]} if embeds else {}


def write(config: Mapping) -> dict[str, Any]:
    """Further original fields: the model type, and the fixed length of the text."""
    image = config["image_dim"]
    if image not in (None, IMAGE_DIM):
        raise ValueError(
            f"{ORIGINAL.network}: image_dim is {image}; the original network's is {IMAGE_DIM}; use to=diffusers "
            "without original="
        )
    plain = config["in_channels"] == config["out_channels"]
    return {"model_type": "t2v" if plain and image is None else "i2v", "text_len": TEXT_TOKENS}


def boundary(config: Mapping) -> float:
    """`boundary` in wan/configs/wan_t2v_A14B.py and wan_i2v_A14B.py of Wan2.2."""
    return 0.875 if config["in_channels"] == config["out_channels"] else 0.9


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
    marks={"img_emb.": CLIP},
    boundary=boundary,
)
