"""HunyuanVideo-1.5: the place of each tensor of diffusers' format in the original checkpoint.

The original fuses q, k, v in the text refiner alone; its final modulation has shift before scale.
"""

from collections.abc import Mapping

from fastlightgen.models.hunyuan.keys import (
    HUNYUAN_DOUBLE,
    HUNYUAN_DOUBLE_NORMS,
    joint_keys,
    refiner_keys,
    swapped,
    width,
)
from fastlightgen.models.keys import Source, Table, named

OUTSIDE = {
    "x_embedder.proj": "img_in.proj",
    "time_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "context_embedder_2.norm": "byt5_in.layernorm",
    "context_embedder_2.linear_1": "byt5_in.fc1",
    "context_embedder_2.linear_2": "byt5_in.fc2",
    "context_embedder_2.linear_3": "byt5_in.fc3",
    "image_embedder.norm_in": "vision_in.proj.0",
    "image_embedder.linear_1": "vision_in.proj.1",
    "image_embedder.linear_2": "vision_in.proj.3",
    "image_embedder.norm_out": "vision_in.proj.4",
    "proj_out": "final_layer.linear",
}
APART = {
    "attn.to_q": "img_attn_q",
    "attn.to_k": "img_attn_k",
    "attn.to_v": "img_attn_v",
    "attn.add_q_proj": "txt_attn_q",
    "attn.add_k_proj": "txt_attn_k",
    "attn.add_v_proj": "txt_attn_v",
}


def hunyuan15_keys(config: Mapping, fused: bool = False) -> Table:
    """Key in diffusers' format -> its place in the original checkpoint, for a diffusers configuration.

    `fused`: the checkpoint has q, k and v in one tensor, as ComfyUI's files have and Tencent's have not.
    """
    renamed, split = named(OUTSIDE) | {"cond_type_embed.weight": "cond_type_embedding.weight"}, dict[str, Source]()
    for i in range(config["num_layers"]):
        prefix, original = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        renamed |= named(HUNYUAN_DOUBLE, prefix, original)
        renamed |= named(HUNYUAN_DOUBLE_NORMS, prefix, original, ("weight",))
        if fused:
            split |= joint_keys(prefix, original, width(config))
        else:
            renamed |= named(APART, prefix, original)
    whole = {key: Source(original) for key, original in renamed.items()}
    return whole | split | refiner_keys(config) | swapped(config)
