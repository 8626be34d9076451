"""The format of the original HunyuanVideo repository: config.json, names of weight files, keys of the checkpoint."""

from fastlightgen.models.hunyuan.keys import hunyuan_keys
from fastlightgen.models.keys import Format

# What the original HunyuanVideo-1.5 has too.
SAME = {
    "out_channels": "out_channels",
    "heads_num": "num_attention_heads",
    "mlp_width_ratio": "mlp_ratio",
    "mm_double_blocks_depth": "num_layers",
    "rope_dim_list": "rope_axes_dim",
    "rope_theta": "rope_theta",
    "text_states_dim": "text_embed_dim",
}
FIXED = {
    "qk_norm": True,
    "qk_norm_type": "rms",
    "qkv_bias": True,
    "mlp_act_type": "gelu_tanh",
    "text_projection": "single_refiner",
    "use_attention_mask": True,
}
ORIGINAL = Format(
    network="HYVideoDiffusionTransformer",
    files=("model.safetensors", "mp_rank_00_model_states.pt"),  # converted to safetensors, and as released
    keys=hunyuan_keys,
    lists={"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"},
    same=SAME
    | {
        "in_channels": "in_channels",
        "mm_single_blocks_depth": "num_single_layers",
        "guidance_embed": "guidance_embeds",
        "text_states_dim_2": "pooled_projection_dim",
        "i2v_condition_type": "image_condition_type",
    },
    width="hidden_size",
    heads="heads_num",
    defaults={"hidden_size": 3072, "heads_num": 24},  # the other fields have the defaults of diffusers' class
    fixed={"patch_size": [1, 2, 2]} | FIXED,
)
