"""HunyuanVideo: the place of each tensor of diffusers' format in the original checkpoint.

The original fuses q, k, v (and the MLP of a single block) into one tensor; its final modulation has shift before scale.
"""

from collections.abc import Mapping

from fastlightgen.models.keys import WEIGHT_BIAS, Source, Table, fused, named

HUNYUAN_OUTSIDE = {
    "x_embedder.proj": "img_in.proj",
    "time_text_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
HUNYUAN_GUIDANCE = {
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.mlp.2",
}
HUNYUAN_TEXT = {
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder.linear_1": "txt_in.c_embedder.linear_1",
    "context_embedder.time_text_embed.text_embedder.linear_2": "txt_in.c_embedder.linear_2",
    "context_embedder.proj_in": "txt_in.input_embedder",
}
HUNYUAN_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_out.0": "self_attn_proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm_out.linear": "adaLN_modulation.1",
}
HUNYUAN_DOUBLE = {
    "norm1.linear": "img_mod.linear",
    "norm1_context.linear": "txt_mod.linear",
    "attn.to_out.0": "img_attn_proj",
    "attn.to_add_out": "txt_attn_proj",
    "ff.net.0.proj": "img_mlp.fc1",
    "ff.net.2": "img_mlp.fc2",
    "ff_context.net.0.proj": "txt_mlp.fc1",
    "ff_context.net.2": "txt_mlp.fc2",
}
HUNYUAN_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn_q_norm",
    "attn.norm_k": "img_attn_k_norm",
    "attn.norm_added_q": "txt_attn_q_norm",
    "attn.norm_added_k": "txt_attn_k_norm",
}


def hunyuan_keys(config: Mapping) -> Table:
    """Key in diffusers' format -> its place in the original HunyuanVideo checkpoint, for a diffusers configuration."""
    dim = width(config)
    mlp = int(dim * config["mlp_ratio"])
    renamed = named(HUNYUAN_OUTSIDE | (HUNYUAN_GUIDANCE if config["guidance_embeds"] else {}))
    split: Table = {}
    for i in range(config["num_layers"]):
        prefix, original = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        renamed |= named(HUNYUAN_DOUBLE, prefix, original) | named(HUNYUAN_DOUBLE_NORMS, prefix, original, ("weight",))
        split |= joint_keys(prefix, original, dim)
    for i in range(config["num_single_layers"]):
        prefix, original = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        renamed |= named({"norm.linear": "modulation.linear", "proj_out": "linear2"}, prefix, original)
        renamed |= named({"attn.norm_q": "q_norm", "attn.norm_k": "k_norm"}, prefix, original, ("weight",))
        parts = [f"{prefix}{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        split |= fused(parts, f"{original}linear1", [dim, dim, dim, mlp])
    whole = {key: Source(original) for key, original in renamed.items()}
    return whole | refiner_keys(config) | swapped(config) | split


def joint_keys(prefix: str, original: str, dim: int) -> Table:
    """Queries, keys and values of a double block, fused for the image and for the text."""
    image = [f"{prefix}attn.{n}" for n in ("to_q", "to_k", "to_v")]
    text = [f"{prefix}attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj")]
    both = fused(image, f"{original}img_attn_qkv", [dim] * 3)
    return both | fused(text, f"{original}txt_attn_qkv", [dim] * 3)


def width(config: Mapping) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def refiner_keys(config: Mapping) -> Table:
    """The part of the table that describes the text refiner."""
    dim, renamed, split = width(config), named(HUNYUAN_TEXT), dict[str, Source]()
    for i in range(config["num_refiner_layers"]):
        prefix = f"context_embedder.token_refiner.refiner_blocks.{i}."
        original = f"txt_in.individual_token_refiner.blocks.{i}."
        renamed |= named(HUNYUAN_REFINER, prefix, original)
        split |= fused([f"{prefix}attn.{n}" for n in ("to_q", "to_k", "to_v")], f"{original}self_attn_qkv", [dim] * 3)
    return {key: Source(original) for key, original in renamed.items()} | split


def swapped(config: Mapping) -> Table:
    """The final modulation: diffusers has scale before shift, so the halves change places."""
    dim, end = width(config), "adaLN_modulation.1"
    return {f"norm_out.linear.{x}": Source(f"final_layer.{end}.{x}", ((dim, 2 * dim), (0, dim))) for x in WEIGHT_BIAS}
