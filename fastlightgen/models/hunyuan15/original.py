"""The format of the original HunyuanVideo-1.5 repository: config.json and the keys of the checkpoint."""

from collections.abc import Mapping
from typing import Any

from fastlightgen.models.hunyuan import original as hunyuan
from fastlightgen.models.hunyuan15.keys import hunyuan15_keys
from fastlightgen.models.keys import Format

RESOLUTIONS = {"480p": 640, "720p": 960}  # ideal_resolution -> diffusers' target_size
DENSE = ("flash", "flash2", "flash3", "torch", "sageattn")  # kernels of the same attention


def read(values: Mapping) -> dict[str, Any]:
    """Further diffusers fields."""
    if (mode := values["attn_mode"]) not in DENSE:
        raise ValueError(
            f"config.json: attn_mode is {mode!r}, the attention of a sparse network; only {DENSE[0]!r} is supported: "
            "give a network whose name does not end in _sparse"
        )
    if (size := RESOLUTIONS.get(values["ideal_resolution"])) is None:
        wanted = " or ".join(map(repr, RESOLUTIONS))
        raise ValueError(f"config.json: ideal_resolution is {values['ideal_resolution']!r}; wanted {wanted}")
    time, *area = values["patch_size"]
    return {
        "in_channels": 2 * values["in_channels"] + 1,  # with the latents of the first frame, and a mask
        "patch_size_t": time,
        "patch_size": area[0],
        "target_size": size,
    }


def write(config: Mapping) -> dict[str, Any]:
    """Further original fields."""
    size = config["patch_size"]
    found = [name for name, target in RESOLUTIONS.items() if target == config["target_size"]]
    return {
        "in_channels": config["out_channels"],
        "patch_size": [config["patch_size_t"], size, size],
        "ideal_resolution": next(iter(found), "480p"),
    } | FIXED


FIXED = hunyuan.FIXED | {
    "concat_condition": True,
    "mm_single_blocks_depth": 0,
    "guidance_embed": False,
    "glyph_byT5_v2": True,
    "vision_projection": "linear",
    "is_reshape_temporal_channels": False,
    "use_cond_type_embedding": True,
}
ORIGINAL = Format(
    network="HunyuanVideo_1_5_DiffusionTransformer",
    keys=hunyuan15_keys,
    lists={"double_blocks": "transformer_blocks"},
    same=hunyuan.SAME
    | {
        "vision_states_dim": "image_embed_dim",
        "ideal_task": "task_type",
        "use_meanflow": "use_meanflow",
    },
    width="hidden_size",
    heads="heads_num",
    # Of the released weights; the original class's own are those of another network.
    defaults={
        "hidden_size": 2048,
        "heads_num": 16,
        "in_channels": 32,
        "patch_size": [1, 1, 1],
        "ideal_resolution": "480p",
        "attn_mode": "flash",
        "attn_param": None,
        "text_states_dim_2": None,
    },
    fixed=FIXED,
    read=read,
    write=write,
)
